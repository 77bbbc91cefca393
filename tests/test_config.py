"""Bad configs are refused with the value, the place and the way out; good ones keep their identity."""

import copy
import dataclasses
import shutil

import pytest

from functional_sam.config import Config, compose, configs_directory, copied, load, refuse_names, settings_of, to_yaml, validated
from functional_sam.config.files import mapping
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
        ("training.precision=fp16", "known: bf16, float32, float64"),
        ("model.kind=mamba", "has a decoder"),
        ("kind=languages", "did you mean 'language'"),
        ("optimizer.name=sdg", "did you mean 'sgd'"),
        ("data.augment=crop-flip", "is for images"),
        ("data.files=3", "data.sources=[c4]"),
        ("data.sources=[newz]", "did you mean 'news'"),
        ("training.data_seed=-1", "training.data_seed=-1: a seed, from 0 to 4294967295"),
        ("training.data_seed=4294967296", "training.data_seed=4294967296"),
        ("training.init_seed=-1", "training.init_seed=-1"),
        ("training.eval_rows=0", "training.eval_rows=0: at least 1"),
        ("training.jitter=1", "training.jitter=1.0"),
        ("optimizer.clip=0", "null for none"),
        ("optimizer.lr=-1", "optimizer.lr=-1"),
        ("runtime.checkpoint_every=0", "checkpoint_every=0"),
        ("runtime.device=foo", "runtime.device=foo: cpu, cuda or cuda:0"),
        ("runtime.threads=100000", "runtime.threads=100000: at most 1024"),
        ("measure.ascents=[foo]", "measure.ascents: 'foo'"),
        ("measure={ascents: [], points: 2}", "measure.ascents=[]"),
        ("measure={targets: [8], temperatures: []}", "measure.temperatures=[]"),
        ("measure={curvature: true, geometries: []}", "measure.geometries=[]"),
        ("training.steps=[1", "cannot be read"),
        ("measure={targets: [8], more_targets: [16, 8]}", "measure.targets: 8 is there twice"),
        ("measure.temperatures=[1, 1.0]", "measure.temperatures: 1.0 is there twice"),
        ("measure.ascents=[adam, adam]", "measure.ascents: adam is there twice"),
        ("method={options: [1]}", "Cannot merge incompatible container types"),
        ("runtime.runs=~nobody-of-this-name/runs", "whose home directory ~ stands for is not known"),
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


def test_a_task_without_a_section_names_the_file():
    with pytest.raises(UserError, match=r"configs/scales/paper.yaml has no section lead-topic: write one, `lead-topic: {}`"):
        compose("lead-topic", "adamw", "paper")


def test_a_task_of_another_scale_names_the_scale():
    with pytest.raises(UserError, match=r"configs/scales/quick.yaml has no section vision-vit-s-16: .* or take --scale paper \("):
        compose("vision-vit-s-16", "gsam", "quick")
    with pytest.raises(UserError, match=r"or take --scale laptop or --scale quick \("):
        compose("lead-topic", "adamw", "paper")


def test_overrides_by_key_however_they_are_written():
    given = settings_of(("training={steps: 5}", "optimizer[lr]=1", "method.options.every=5", "cells=a,b"))
    assert list(given) == ["training.steps", "optimizer.lr", "method.options.every", "cells"]
    for override, option in (("task=vision", "--task"), ("kind=vision", "--task"), ("method={name: adamw}", "--method")):
        with pytest.raises(UserError, match=f"train {option} NAME"):
            refuse_names([override])


def test_a_home_directory_is_meant(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    runtime = compose("language", overrides=["runtime.runs=~/runs", "runtime.cache=~/cache", "runtime.data=~/data"]).runtime
    assert (runtime.runs, runtime.cache, runtime.data) == ("/home/me/runs", "/home/me/cache", "/home/me/data")


def test_what_cannot_change_a_result_is_not_in_the_hash():
    plain = compose("language", "sam", "quick")
    assert compose("language", "sam", "quick", overrides=["runtime.threads=1", "runtime.runs=elsewhere"]).hash == plain.hash
    for override in ("training.init_seed=1", "method.rho=0.1", "method.options.scope=rank", "measure.points=3"):
        assert compose("language", "sam", "quick", overrides=[override]).hash != plain.hash, override


def test_a_copy_shares_nothing_that_can_be_changed():
    given = ["measure.temperatures=[1.0,2.0]", "data.elsewhere=[technical]"]
    first = compose("language", "wsam", "quick", overrides=given)
    before, second = copy.deepcopy(first), copied(first)
    assert second == first
    second.method.options["every"] = 3
    second.measure.temperatures.append(4.0)
    second.training.steps += 1
    assert compose("language", "wsam", "quick", overrides=given) == first == before != second


def test_yaml_round_trip(tmp_path):
    config = compose("vision", "precond-sam", "quick", overrides=["method.rho=0.1", "method.options.normalize_by=gradient"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "config.yaml") == config


def test_what_a_run_has_written_is_read_as_omegaconf_reads_it(tmp_path):
    """By YAML alone, which is 20 times faster: numbers, none, and words that look like numbers or dates."""
    config = compose("language", "sam")
    config.optimizer.lr, config.optimizer.eps, config.training.jitter = 1e-07, 1e16, float("inf")
    config.data.hub, config.data.tokenizer, config.data.texts = "1e-3", "2026-11-30", "null"
    config.method.options = {"rho_schedule": "off", "phi": 1e-05, "nested": {"1": [None, True, "yes", "0x10", "1_0", ""]}}
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert repr(mapping(path, written=True)) == repr(mapping(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- 1", "expected a mapping, found a list"),
        ("5", "expected a mapping, found a number"),
        ("a: [", r"cannot be read \(while parsing a flow node .*line 2"),
        ("training: {steps: x}", "training.steps: Value 'x'"),
        ("training: 3", "int is not a subclass of TrainingConfig"),
        ("trainig: {}", "unknown key 'trainig'; did you mean 'training'"),
    ],
)
def test_a_file_that_is_no_config_is_named(content, message, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(content + "\n")
    with pytest.raises(UserError, match=rf"config\.yaml: .*{message}"):
        load(path)


def test_defaults_are_in_the_schema_only():
    """No YAML repeats the schema's default."""
    from omegaconf import OmegaConf

    default = dataclasses.asdict(Config())
    # A task names its data and kind even where they are the default: that is what the file is for.
    named = {"data.sources", "data.vocab", "data.images", "model.patch", "model.length", "model.depth"}
    for path in (configs_directory() / "tasks").glob("*.yaml"):
        content = OmegaConf.to_container(OmegaConf.load(path))
        content.pop("kind")
        repeated = {
            f"{section}.{key}"
            for section, values in content.items()
            for key, value in values.items()
            if default[section][key] == value
        }
        assert repeated <= named, (path, repeated - named)


def test_validation_changes_nothing_and_none_stands_for_absent():
    config = compose("language", "sam", "quick", overrides=["training.micro_batch=null", "training.eval_every=null"])
    before = dataclasses.asdict(config)
    assert validated(config) is config
    assert dataclasses.asdict(config) == before
    assert (config.training.micro_batch, config.micro_batch) == (None, config.training.batch)


def test_what_the_optimizer_lacks_is_not_measured():
    for override in ("measure.points=3", "measure.curvature=true"):
        with pytest.raises(UserError, match=r"measure.ascents=\[gradient\] does without"):
            compose("language", "adamw", "quick", overrides=["optimizer.name=sgd", override])
        compose("language", "adamw", "quick", overrides=["optimizer.name=sgd", override, "measure.ascents=[gradient]"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_their_parameter_counts(name):
    shape = compose(f"language-{name}", "adamw").model
    config = compose(f"language-{name}", "adamw")
    model = Decoder(config.data.vocab, shape.width, shape.depth, shape.heads, shape.length, shape.mlp, device="meta")
    exact = {"23.9M": 23_895_360, "42.5M": 42_477_312, "117.9M": 117_981_440, "1208M": 1_208_059_904}
    assert model.num_parameters(non_embedding=True) == exact[name]


@pytest.mark.parametrize(
    ("line", "key", "way"), [("method: {name: sam}", "method.name", "--method"), ("task: other", "task", "--task")]
)
def test_a_file_cannot_say_what_the_command_line_says(tmp_path, monkeypatch, line, key, way):
    """The method of a task's own file was taken for AdamW, without a word."""
    shutil.copytree(configs_directory(), tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "tasks" / "mine.yaml").write_text(f"kind: language\n{line}\n")
    with pytest.raises(UserError, match=rf"^configs/tasks/mine.yaml: {key} is not of a file: choose it with {way}"):
        compose("mine")


@pytest.mark.parametrize("name", ["0412", "2026_11_30", "1_000", "12:30", "yes", "a #b", "a: b", "[x]", "1e3"])
def test_the_name_of_a_directory_is_no_yaml(tmp_path, name):
    """0412 is the number 266 there, and runs went to another directory without a word."""
    config = compose("language", overrides=[f"runtime.runs={name}", f"runtime.cache={name}"])
    assert (config.runtime.runs, config.runtime.cache) == (name, name)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "config.yaml") == config
    assert compose("language", overrides=["runtime.data=null"]).runtime.data is None
