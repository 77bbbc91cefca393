"""A setting that does nothing in a task is refused where it was typed; the table of what is read is what is read."""

import pytest
import yaml
from any_task import in_table, settings_read

from functional_sam.cli import main
from functional_sam.config import compose, configs_directory
from functional_sam.errors import UserError
from functional_sam.exhibits import needed, ready
from functional_sam.tasks.settings import READS, readers, require_read

SMALL = ["training.batch=4", "training.eval_rows=4", "training.test_rows=4"]


@pytest.mark.parametrize(
    ("task", "override", "model", "others"),
    [
        ("vision", "data.share=0.5", "vit", "encoder, t5"),
        ("vision", "model.length=64", "vit", "decoder, encoder, t5, marian"),
        ("vision", "model.norm=batch", "vit", "convnet"),
        ("vision-convnet", "model.depth=4", "convnet", "decoder, vit, encoder, t5, marian"),
        ("language", "model.frozen=1", "decoder", "encoder"),
        ("language", "data.unique_texts=9", "decoder", "encoder, t5"),
        ("question-type", "model.embedding_scale=2", "encoder", "decoder"),
        ("translation", "data.share=0.1", "marian", "encoder, t5"),
        ("t5-small-superglue", "model.activation=relu", "t5", "vit, convnet, marian"),
    ],
)
def test_a_setting_that_nothing_reads_is_refused_where_it_was_typed(task, override, model, others):
    said = f"does nothing in a task of kind \\S+ with model.kind={model}; it is for {others}$"
    with pytest.raises(UserError, match=f"^override '{override}' {said}"):
        require_read(compose(task, overrides=[override]), [override])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer.momentum=0.5"], "override 'optimizer.momentum=0.5' does nothing with optimizer.name=adamw; it is for sgd"),
        (["optimizer.name=sgd", "optimizer.beta2=0.5"], "does nothing with optimizer.name=sgd; it is for adamw"),
        (["optimizer={name: adafactor, eps: 1.0}"], "does nothing with optimizer.name=adafactor; it is for adamw"),
    ],
)
def test_a_setting_of_another_optimizer_is_refused(overrides, words):
    with pytest.raises(UserError, match=words):
        require_read(compose("vision", overrides=overrides), overrides)


def test_a_setting_of_the_optimizer_at_hand_is_not():
    for own in (["optimizer.beta2=0.5"], ["optimizer.name=sgd", "optimizer.momentum=0.5", "optimizer.beta1=0.9"]):
        require_read(compose("vision", overrides=own), own)
    after = ["optimizer.name=sgd", "optimizer.beta2=0.5", "measure.robustness=true", "data.elsewhere=[technical]"]
    require_read(compose("language", overrides=after), after)  # its weights are trained on by AdamW


@pytest.mark.parametrize("task", ["roberta-glue", "roberta-cola", "t5-small-superglue", "translation-iwslt14"])
def test_another_copy_on_the_hub_is_read(task):
    own = ["data.hub=someone/copy"]
    require_read(compose(task, overrides=own), own)


def test_packaged_texts_are_on_no_hub():
    with pytest.raises(UserError, match=r"data\.hub=someone/copy: movie-grade comes with a package"):
        compose("movie-grade", overrides=["data.hub=someone/copy"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.head_dtype=bfloat16"], "does nothing with training.precision=float32; it is for bf16"),
        (["optimizer={schedule: constant, lr_end: 0.5}"], "does nothing with optimizer.schedule=constant; it is for cosine, lin"),
    ],
)
def test_a_setting_that_another_one_switches_off_is_refused(overrides, words):
    with pytest.raises(UserError, match=f"override .* {words}"):
        require_read(compose("language", scale="quick", overrides=overrides), overrides)


def test_a_setting_that_another_one_switches_on_is_not():
    for own in (["model.head_dtype=bfloat16", "training.precision=bf16"], ["optimizer.lr_end=0.5"], ["optimizer.lr_start=0.5"]):
        require_read(compose("language", scale="quick", overrides=own), own)


def test_a_grade_has_no_smoothed_label():
    compose("movie-sentiment", overrides=["training.label_smoothing=0.1"])
    with pytest.raises(UserError, match=r"training.label_smoothing=0.1: a grade has no classes"):
        compose("movie-grade", overrides=["training.label_smoothing=0.1"])


def test_a_grade_has_no_temperature():
    compose("movie-sentiment", overrides=["measure={curvature: true, temperature: true}"])
    with pytest.raises(UserError, match=r"measure.temperature=True: a grade has no classes"):
        compose("movie-grade", overrides=["measure={curvature: true, temperature: true}"])


def test_train_refuses_it_before_any_time_is_spent(capsys, tmp_path):
    assert main(["train", "--task", "vision", "data.share=0.5", f"runtime.runs={tmp_path}/runs"]) == 2
    assert "override 'data.share=0.5' does nothing" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("exhibit", "override", "words"),
    [
        ("table-5", "data.share=0.5", "does nothing in table-5, whose models are convnet, vit; it is for encoder, t5"),
        ("figure-3", "model.patch=7", "does nothing in figure-3, whose models are decoder; it is for vit, convnet"),
        ("figure-3", "optimizer.momentum=0.5", "does nothing in figure-3, whose optimizers are adamw; it is for sgd"),
        (
            "figure-1",
            "model.head_dtype=bfloat16",
            "in figure-1, whose values of training.precision are float32; it is for bf16",
        ),
    ],
)
def test_an_exhibit_refuses_what_none_of_its_runs_reads(exhibit, override, words):
    with pytest.raises(UserError, match=words):
        needed(exhibit, "quick", (override,))
    with pytest.raises(UserError, match=words):
        ready(exhibit, "quick", (override,))


@pytest.mark.parametrize("exhibit", ["figure-3", "figure-2"])  # of a study, and of none
def test_what_the_same_command_makes_unread_is_refused(exhibit):
    with pytest.raises(UserError, match=r"override 'optimizer.beta1=0.8' does nothing in .* whose optimizers are sgd"):
        needed(exhibit, "quick", ("optimizer.name=sgd", "optimizer.beta1=0.8"))
    assert needed(exhibit, "quick", ("optimizer.name=sgd", "optimizer.momentum=0.8"))


def test_an_exhibit_takes_what_one_of_its_tasks_reads():
    assert {config.model.kind for config in needed("figure-1", "quick", ("data.vocab=384",))} == {"decoder", "vit"}
    # of table-5's runs the first ones, all that are named at once, are of a vit; and 1 is the default anyhow
    assert needed("table-5", "quick", ("model.norm=batch", "data.share=1"))
    assert needed("table-5", "quick", ("optimizer.momentum=0.5",))  # and AdamW's, but for one entry
    assert needed("figure-1", "quick", ("model.head_dtype=bfloat16", "training.precision=bf16"))


def test_what_is_the_default_anyhow_is_no_mistake():
    require_read(compose("vision", overrides=["data.share=1"]), ["data.share=1"])


def test_another_model_may_be_chosen_over_what_a_scale_says_of_the_first():
    own = compose("vision", scale="laptop", overrides=["model.kind=convnet"])
    assert own.model.depth == 4  # which a convnet does not read, and nobody typed
    require_read(own, ["model.kind=convnet", "model={norm: batch}", "training.steps=3"])


def test_files_of_tasks_say_nothing_that_nothing_reads():
    for path in sorted((configs_directory() / "tasks").glob("*.yaml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        kind = content.get("model", {}).get("kind", "decoder")
        for section in ("model", "data"):
            for key in set(content.get(section, {})) - {"kind"}:
                assert kind in readers(section, key), f"{path.name}: {section}.{key}"


@pytest.mark.parametrize(
    ("task", "kind", "overrides"),
    [
        ("language", "decoder", ["model.width=16", "model.depth=1", "data.elsewhere=[technical]"]),
        ("vision", "vit", ["model.width=16", "model.depth=1", "data.noise=0.1", "data.augment=crop-flip"]),
        ("vision", "vit", ["model.width=16", "model.depth=1", "data.relabel=40"]),
        ("vision-convnet", "convnet", []),
    ],
)
def test_the_table_holds_all_that_a_task_reads(task, kind, overrides, cache, monkeypatch):
    own = compose(task, scale="quick", overrides=[*overrides, *SMALL, f"runtime.cache={cache}"])
    read = settings_read(own, monkeypatch)
    assert {"model.width", "model.head_dtype"} < read
    assert read <= in_table(kind)


def test_every_setting_of_the_table_is_one_of_the_schema():
    own = compose("language")
    for kind in READS:
        for name in in_table(kind):
            section, key = name.split(".")
            assert hasattr(getattr(own, section), key), f"{kind}: {name}"
