"""Products of a part of the parameters, the groups that name such parts, and Adam's geometry."""

import pytest
import torch
from conftest import TinyReadout, make_model
from test_curvature import case, decoder, directions, error, flat, seeded, vision
from torch import nn

from functional_sam.curvature import CurvatureProducts, parameter_groups
from functional_sam.errors import UserError

NAMES = ("hessian", "gauss_newton", "functional")


def dense(product, products):
    """The whole matrix, column by column."""
    sizes, shapes = [p.numel() for p in products.parameters], [p.shape for p in products.parameters]
    columns = torch.eye(sum(sizes), dtype=torch.float64)
    return torch.stack(
        [flat(product([part.view(shape) for part, shape in zip(e.split(sizes), shapes, strict=True)])) for e in columns]
    )


@pytest.mark.parametrize("name", NAMES)
def test_subsets_are_blocks_of_the_dense_matrix(name):
    """On a decoder of about 500 parameters."""
    model = decoder(vocab=7, width=6, depth=1, heads=2, length=5, mlp=8)
    inputs = torch.randint(7, (3, 5), generator=seeded(1))
    batches = [(inputs, inputs.roll(-1, 1))]
    whole = CurvatureProducts(model, batches)
    A = dense(getattr(whole, name), whole)
    assert 300 < len(A) < 500
    assert torch.allclose(A, A.T, rtol=0, atol=1e-12)
    if name == "gauss_newton":
        assert torch.linalg.eigvalsh(A).min() > -1e-12
    owner = torch.cat([torch.full((p.numel(),), i) for i, p in enumerate(whole.parameters)])
    for group in parameter_groups(model).values():
        at = torch.isin(owner, torch.tensor([i for i, p in enumerate(whole.parameters) if any(p is q for q in group)]))
        products = CurvatureProducts(model, batches, parameters=group)
        assert torch.allclose(dense(getattr(products, name), products), A[at][:, at], rtol=0, atol=1e-12)


def names_of(model, group):
    return [name for name, p in model.named_parameters() if any(p is q for q in group)]


def test_groups_of_our_models():
    kinds = parameter_groups(decoder(), by="kind")
    assert {kind: len(group) for kind, group in kinds.items()} == {"embedding": 2, "norm": 5, "attention": 4, "mlp": 4}
    model, _ = vision()
    assert names_of(model, parameter_groups(model)["embedding"]) == ["positions", "patches.weight"]
    assert names_of(model, parameter_groups(model)["head"]) == ["head.weight"]
    layers = parameter_groups(model, by="layer")
    assert {layer: len(group) for layer, group in layers.items()} == {
        "embedding": 2,
        "blocks.0": 6,
        "blocks.1": 6,
        "norm": 1,
        "head": 1,
    }
    assert sum(len(group) for group in layers.values()) == len(list(model.parameters()))


NAMES_OF_OTHERS = {  # GPT-2, Llama, BERT and ViT of Hugging Face, timm, torch
    "transformer.wte.weight": "embedding",
    "transformer.wpe.weight": "embedding",
    "transformer.h.0.ln_1.weight": "norm",
    "transformer.h.0.attn.c_attn.weight": "attention",
    "transformer.h.0.mlp.c_fc.bias": "mlp",
    "transformer.ln_f.weight": "norm",
    "model.embed_tokens.weight": "embedding",
    "model.layers.11.self_attn.q_proj.weight": "attention",
    "model.layers.11.mlp.gate_proj.weight": "mlp",
    "model.layers.11.input_layernorm.weight": "norm",
    "lm_head.weight": "head",
    "bert.encoder.layer.3.attention.output.dense.weight": "attention",
    "bert.encoder.layer.3.attention.output.LayerNorm.weight": "norm",
    "bert.encoder.layer.3.intermediate.dense.weight": "mlp",
    "bert.encoder.layer.3.output.dense.weight": "mlp",
    "vit.embeddings.patch_embeddings.projection.weight": "embedding",
    "cls_token": "embedding",
    "pos_embed": "embedding",
    "blocks.0.attn.qkv.weight": "attention",
    "encoder.layers.2.linear1.weight": "mlp",
    "encoder.layers.2.self_attn.in_proj_weight": "attention",
    "classifier.bias": "head",
}


def test_groups_of_other_models_by_name():
    model = nn.Module()
    for name in NAMES_OF_OTHERS:
        *path, last = name.split(".")
        module = model
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, nn.Parameter(torch.zeros(1)))
    found = {name: kind for kind, group in parameter_groups(model).items() for name in names_of(model, group)}
    assert found == NAMES_OF_OTHERS
    layers = parameter_groups(model, by="layer")
    assert {"transformer.h.0", "model.layers.11", "bert.encoder.layer.3", "encoder.layers.2", "blocks.0"} < set(layers)
    assert parameter_groups(make_model(TinyReadout), "kind").keys() == {"embedding", "mlp", "norm"}


def test_groups_refuse_what_they_do_not_know():
    strange = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(2, 2))
    for words, build in {
        "0.weight": lambda: parameter_groups(strange),
        "'size'": lambda: parameter_groups(strange, by="size"),
        "numbered blocks": lambda: parameter_groups(make_model(TinyReadout), by="layer"),
    }.items():
        with pytest.raises(UserError, match=words):
            build()
    assert list(parameter_groups(strange, by="layer")) == ["0", "1"]


def test_selections_combine():
    model, batches = case("decoder")
    chosen = CurvatureProducts(model, batches, parameters=["norm", "blocks.0.*", model.positions]).parameters
    assert len(chosen) == 5 + 4 + 1
    assert len({id(p) for p in chosen}) == len(chosen)


# --- Adam's geometry ------------------------------------------------------------------------------------------------------


def test_adam_geometry():
    model, batches = case("decoder")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-4)
    products = CurvatureProducts(model, batches)
    with pytest.raises(UserError, match="not stepped"):
        products.in_adam_geometry(optimizer)
    for _ in range(2):
        for p, g_i in zip(products.parameters, products.gradient(), strict=True):
            p.grad = g_i
        optimizer.step()
    geometry = products.in_adam_geometry(optimizer)
    v_hat = [optimizer.state[p]["exp_avg_sq"] / (1 - 0.98**2) for p in products.parameters]
    root = [(s.sqrt() + 1e-4).pow(-0.5) for s in v_hat]
    given = products.in_adam_geometry(second_moments=v_hat, eps=1e-4)
    v, w = directions(products, count=2)
    scaled = lambda tensors: [t * r for t, r in zip(tensors, root, strict=True)]  # noqa: E731
    for name in NAMES:
        expected = scaled(getattr(products, name)(scaled(v)))
        assert error(getattr(geometry, name)(v), expected) < 1e-12
        assert error(getattr(given, name)(v), expected) < 1e-12
        assert flat(w) @ flat(expected) == pytest.approx(float(flat(v) @ flat(getattr(geometry, name)(w))), rel=1e-9)
    assert error(geometry.split(v)[1], geometry.functional(v)) < 1e-12
    assert error(geometry.gradient(), scaled(products.gradient())) < 1e-13
    subset = CurvatureProducts(model, batches, parameters="norm")
    assert len(subset.in_adam_geometry(optimizer).hessian(directions(subset))) == 5
    for words, arguments in {
        "one of the two": {},
        "shaped unlike": {"second_moments": v_hat[1:]},
        "which SGD does not keep": {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1)},
    }.items():
        with pytest.raises(UserError, match=words):
            products.in_adam_geometry(**arguments)
