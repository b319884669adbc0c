"""The trainable form of a draft against the decoder that it becomes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from speckv.models.llama import LlamaDecoder
from speckv.models.loading import wrap_model
from speckv.training.student import Student
from tests.models.conftest import FAMILY, VOCAB, seeded
from tests.tolerances import assert_close

ID_MAP = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))[:90]


def moved(student: Student) -> Student:
    """With every trainable weight changed, as training would."""
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for tensor in student.trainable().values():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=draw))
    return student.eval()


def batch(lengths: list[int]) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(6)
    tokens = torch.randint(0, VOCAB, (len(lengths), max(lengths)), generator=draw)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return tokens * mask, mask


@pytest.mark.parametrize("layers", [(0, 2), (2, 0), (1,)])
@pytest.mark.parametrize("name", FAMILY)
def test_its_logits_are_those_of_the_exported_decoder(name: str, layers: tuple[int, ...]) -> None:
    model = seeded(FAMILY[name])
    student = moved(Student(model.config, model.state_dict(), layers, ID_MAP))
    target = wrap_model(model, device="cpu")
    assert isinstance(target, LlamaDecoder)
    tensors = {name: t.detach() for name, t in student.trainable().items()}
    draft = target.slice_draft(tensors, layers, len(ID_MAP), name="draft")
    lengths = [31, 5, 18]
    tokens, mask = batch(lengths)
    with torch.no_grad():
        logits = student(tokens, mask, torch.arange(mask.numel())).unflatten(0, mask.shape)
    for row, length, found in zip(tokens, lengths, logits, strict=True):
        expected = draft.forward(row[None, :length], [0], draft.new_cache(1, length))[0]
        scale = float(expected.abs().max())
        assert_close(found[:length] / scale, expected / scale, torch.float32)


def test_it_begins_as_its_target() -> None:
    """With all layers and the whole vocabulary."""
    model = seeded(FAMILY["llama-tied-llama3"])
    everything = torch.arange(VOCAB)
    student = Student(model.config, model.state_dict(), (0, 1, 2), everything).eval()
    tokens, mask = batch([20])
    with torch.no_grad():
        found = student(tokens, mask, torch.tensor([3, 19]))
        expected = model(tokens).logits[0, [3, 19]]
    assert_close(found, expected, torch.float32)


def test_the_head_of_a_target_that_shares_its_embedding() -> None:
    """Is the embedding, though the checkpoint hold another matrix by the head's name."""
    model = seeded(FAMILY["llama-tied-llama3"])
    tensors = dict(model.state_dict())
    for stale in (torch.zeros(VOCAB, 48), None):
        tensors.pop("lm_head.weight", None)
        if stale is not None:
            tensors["lm_head.weight"] = stale
        student = Student(model.config, tensors, (0,), ID_MAP)
        assert torch.equal(student.head.weight, tensors["model.embed_tokens.weight"][ID_MAP])


def test_it_has_no_dropout() -> None:
    """A resumed training does not repeat random numbers."""
    model = seeded(FAMILY["llama-linear"])
    model.config.attention_dropout = 0.5
    student = Student(model.config, model.state_dict(), (0, 1), ID_MAP).train()
    assert model.config.attention_dropout == 0.5 and model.config.num_hidden_layers == 3
    tokens, mask = batch([12])
    outputs = [student(tokens, mask, torch.arange(12)) for _ in range(2)]
    assert torch.equal(*outputs)


def test_what_it_trains_has_the_names_of_a_drafts_file() -> None:
    model = seeded(FAMILY["qwen3-yarn"])
    student = Student(model.config, model.state_dict(), (0, 2), ID_MAP)
    expected = {
        name.replace("layers.2.", "layers.1.")
        for name in model.state_dict()
        if "layers.1." not in name and "embed_tokens" not in name
    }
    assert set(student.trainable()) == expected
    source = model.state_dict()["model.layers.2.mlp.up_proj.weight"]
    assert torch.equal(student.trainable()["model.layers.1.mlp.up_proj.weight"], source)
    assert student.trainable()["lm_head.weight"].shape[0] == len(ID_MAP)
