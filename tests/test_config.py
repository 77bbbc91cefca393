"""Bad configs are refused with the value, the place and the way out; good ones keep their identity."""

import dataclasses

import pytest

from functional_sam.config import Config, compose, configs_directory, load, to_yaml
from functional_sam.errors import UserError
from functional_sam.models import PUBLISHED, Decoder


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.stepz=3", "unknown key 'training.stepz'; did you mean 'training.steps'"),
        ("trainning.steps=3", "unknown key 'trainning'; did you mean 'training'"),
        ("training.steps=many", "training.steps"),
        ("training.steps=0", "training.steps=0"),
        ("training.steps", "expected key=value"),
        ("model.heads=3", "model.heads=3 does not divide model.width=64"),
        ("method.rho=-1", "method.rho=-1"),
        ("method.rho=nan", "method.rho=nan"),
        ("training.micro_batch=5", "training.micro_batch=5 does not divide training.batch=16"),
        ("training.precision=fp16", "bf16, float32 or float64"),
        ("model.kind=mamba", "decoder or vit"),
        ("optimizer.lr=-1", "optimizer.lr=-1"),
        ("runtime.checkpoint_every=0", "checkpoint_every=0"),
    ],
)
def test_bad_values(override, words):
    with pytest.raises(UserError) as error:
        compose("language", "sam", "quick", overrides=[override])
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("languge", "sam", "quick"), "unknown task 'languge'; did you mean 'language'"),
        (("language", "functional", "quick"), "did you mean 'functional-sam'"),
        (("language", "sam", "quik"), "unknown scale 'quik'; did you mean 'quick'"),
    ],
)
def test_unknown_names(arguments, words):
    with pytest.raises(UserError, match=words):
        compose(*arguments)


def test_what_cannot_change_a_result_is_not_in_the_hash():
    plain = compose("language", "sam", "quick")
    assert compose("language", "sam", "quick", overrides=["runtime.threads=1", "runtime.runs=elsewhere"]).hash == plain.hash
    for override in ("training.init_seed=1", "method.rho=0.1", "method.options.scope=rank", "measure.points=3"):
        assert compose("language", "sam", "quick", overrides=[override]).hash != plain.hash, override


def test_yaml_round_trip(tmp_path):
    config = compose("vision", "precond-sam", "quick", overrides=["method.rho=0.1", "method.options.normalize_by=gradient"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "config.yaml") == config


def test_defaults_are_in_the_schema_only():
    """No YAML repeats the schema's default."""
    from omegaconf import OmegaConf

    default = dataclasses.asdict(Config())
    for folder in ("tasks", "methods"):
        for path in (configs_directory() / folder).glob("*.yaml"):
            content = OmegaConf.to_container(OmegaConf.load(path))
            repeated = [
                f"{section}.{key}"
                for section, values in content.items()
                for key, value in values.items()
                if default[section][key] == value
            ]
            # A task names its data and kind even where they are the default: that is what the file is for.
            assert set(repeated) <= {"model.kind", "model.patch", "data.sources", "data.vocab", "data.images", "method.name"} | {
                "model.length",
                "model.depth",
            }, (path, repeated)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_their_parameter_counts(name):
    shape = compose(f"language-{name}", "adamw").model
    config = compose(f"language-{name}", "adamw")
    model = Decoder(config.data.vocab, shape.width, shape.depth, shape.heads, shape.length, shape.mlp, device="meta")
    exact = {"23.9M": 23_895_360, "42.5M": 42_477_312, "117.9M": 117_981_440, "1208M": 1_208_059_904}
    assert model.num_parameters(non_embedding=True) == exact[name]
