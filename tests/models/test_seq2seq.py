"""Sequence-to-sequence networks: log-probabilities, padding, pieces, what is refused."""

from __future__ import annotations

import copy
import json
import shutil
from functools import partial
from pathlib import Path

import pyro
import pytest
import torch
import torch.nn.functional as functional
from safetensors.torch import load_file, save_file
from torch.func import functional_call
from transformers import BartConfig

from bads_ppl.data import Data
from bads_ppl.errors import InputError
from bads_ppl.priors import NormalPrior, SparsityPrior
from bads_ppl.program import Parts, bind, capture_features
from bads_ppl.sgld import SGLD
from bads_ppl.weights import InstanceWeights, WeightNetwork
from models.bilevel import bilevel
from models.joint import joint
from models.language import IGNORED, sequence_loss, token_loss
from models.normalised import normalised
from models.seq2seq import Seq2Seq
from models.seq2seq_tokens import SIZES, Pieces, build_folder

NAMES = ("Aarhus Airport", "Alan Bean", "the 11th Mississippi", "José Martí")
SOURCES = [f"{a} | location | {b}" for a in NAMES for b in NAMES]
TARGETS = [f"{a} is{' said to be' * (k % 3)} in {b}." for k, a in enumerate(NAMES) for b in NAMES]
SMALL = {
    "d_model": 16,
    "d_kv": 8,
    "num_heads": 2,
    "d_ff": 24,
    "num_layers": 1,
    "feed_forward_proj": "gelu",  # at a kink, rounding alone would change a gradient
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "tiny", SMALL)
        return build_folder(tmp_path_factory.mktemp("cache"), SOURCES + TARGETS, "tiny", 70)


@pytest.fixture(scope="module")
def tokens(folder) -> dict[str, torch.Tensor]:
    """Seven pairs of different lengths."""
    pieces = Pieces(folder, 64, 64)
    some = slice(0, 14, 2)
    return pieces.pad(pieces.source(SOURCES[some]), pieces.target(TARGETS[some]))


def built(folder: Path, **options) -> Seq2Seq:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Seq2Seq(folder, pretrained=False, **options)


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory) -> Path:
    """A pretrained T5 with dropout, as save_pretrained writes it."""
    target = tmp_path_factory.mktemp("saved") / "t5"
    network = built(folder)
    network.model.config.dropout_rate = 0.5
    network.model.save_pretrained(target)
    for path in folder.glob("tokenizer*"):
        shutil.copy(path, target)
    return target


@pytest.fixture(scope="module")
def bart(tmp_path_factory) -> Path:
    """The folder of a BART that drops units and layers."""
    target = tmp_path_factory.mktemp("bart")
    size = {"d_model": 16, "max_position_embeddings": 64, "vocab_size": 70, "dropout": 0.5}
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (
            ("layers", 1), ("attention_heads", 2), ("ffn_dim", 16), ("layerdrop", 0.5)
        )
    }  # fmt: skip
    BartConfig(**size, **sides).save_pretrained(target)
    return target


def rows_of(tokens, places) -> dict[str, torch.Tensor]:
    return {name: value[places] for name, value in tokens.items()}


def gradients(network, tokens) -> dict[str, torch.Tensor]:
    """Of a loss that weighs the rows differently."""
    output = network(tokens)
    share = torch.linspace(0.1, 1.0, len(output))
    network.zero_grad()
    (share * token_loss(output, tokens["labels"])).sum().backward()
    return {name: value.grad.clone() for name, value in network.named_parameters()}


def assert_close(found: dict, wanted: dict, atol: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.allclose(found[name], wanted[name], rtol=1e-4, atol=atol), name
    assert max(float(value.abs().max()) for value in wanted.values()) > 1e-2


# ----------------------------------------------------------------------- losses and embeddings


@pytest.mark.parametrize("kind", ["folder", "bart"])
def test_a_row_s_loss_and_embedding_are_those_that_it_has_alone(kind, tokens, request):
    """By hand from the model's logits, and whatever a row is padded to and with."""
    network = built(request.getfixturevalue(kind))
    wider = {
        "ids": functional.pad(tokens["ids"], (0, 3), value=9),
        "mask": functional.pad(tokens["mask"], (0, 3)),
        "labels": functional.pad(tokens["labels"], (0, 4), value=IGNORED),
    }
    spoilt = wider | {"ids": torch.where(wider["mask"] == 1, wider["ids"], 13)}
    with torch.no_grad(), capture_features(network, network.embedding_layer) as kept:
        together, output, garbage = network(tokens), network(wider), network(spoilt)
    assert output.shape == wider["labels"].shape and torch.equal(output, garbage)
    assert torch.allclose(output[:, :-4], together, atol=1e-6)
    assert kept[0].shape == (7, network.embedding_layer.in_features)
    assert torch.allclose(kept[0], kept[1], atol=1e-5) and torch.equal(kept[1], kept[2])
    means, sums = (loss(output, wider["labels"]) for loss in (token_loss, sequence_loss))
    start = network.model.config.decoder_start_token_id
    for row in range(7):
        ids = tokens["ids"][row][tokens["mask"][row] == 1]
        labels = tokens["labels"][row][tokens["labels"][row] != IGNORED]
        shifted = torch.cat([torch.tensor([start]), labels[:-1]])
        with torch.no_grad():
            result = network.model(input_ids=ids[None], decoder_input_ids=shifted[None])
        losses = functional.cross_entropy(result.logits[0], labels, reduction="none")
        assert torch.allclose(output[row, : len(labels)], -losses, atol=1e-5)
        assert (output[row, len(labels) :] == 0).all()
        assert means[row].item() == pytest.approx(losses.mean().item(), rel=1e-5)
        assert sums[row].item() == pytest.approx(losses.sum().item(), rel=1e-5)
        state = result.encoder_last_hidden_state[0, -1]
        assert torch.allclose(kept[0][row], state, atol=1e-5)
    assert sums.min() > 1 and kept[0].std(0).min() > 1e-4


def test_columns_that_are_padding_in_all_rows_do_not_reach_the_model(folder, tokens):
    network, seen = built(folder), []
    network.model.register_forward_pre_hook(
        lambda _, args, named: seen.append(
            (named["input_ids"].shape, named["decoder_input_ids"].shape)
        ),
        with_kwargs=True,
    )
    short = rows_of(tokens, slice(0, 2))
    network({name: functional.pad(value, (0, 50), value=IGNORED * (name == "labels"))
             for name, value in short.items()})  # fmt: skip
    sources = int(short["mask"].sum(1).max())
    targets = int((short["labels"] != IGNORED).sum(1).max())
    assert seen == [((2, sources), (2, targets))]


def test_pieces_have_rows_of_about_one_length_and_outputs_keep_their_order(folder, tokens):
    whole, pieces, widths = built(folder), built(folder, rows=2), []
    pieces.model.register_forward_pre_hook(
        lambda _, args, named: widths.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    found, states = {}, {}
    for name, network in (("whole", whole), ("pieces", pieces)):
        with torch.no_grad(), capture_features(network) as kept:
            found[name] = network(tokens)
        states[name] = kept[0]
    assert torch.allclose(found["pieces"], found["whole"], atol=1e-6)
    assert torch.allclose(states["pieces"], states["whole"], atol=1e-6)
    lengths = sorted((tokens["mask"].sum(1) + (tokens["labels"] != IGNORED).sum(1)).tolist())
    assert widths == sorted(widths) and len(widths) == 4 and len(set(lengths)) > 2


def test_ignored_positions_count_nothing_in_a_loss():
    output = torch.tensor([[-1.0, -2.0, -9.0], [-4.0, -9.0, -9.0], [-9.0, -9.0, -9.0]])
    target = torch.tensor([[3, 4, IGNORED], [5, IGNORED, IGNORED], [IGNORED] * 3])
    assert sequence_loss(output, target).tolist() == [3.0, 4.0, 0.0]
    assert token_loss(output, target).tolist() == [1.5, 4.0, 0.0]


@pytest.mark.parametrize("kind", ["saved", "bart"])
def test_dropout_stays_off_in_training(kind, tokens, request):
    network = Seq2Seq(request.getfixturevalue(kind), pretrained=kind == "saved")
    assert network.training and network.model.training
    with torch.no_grad():
        found = network(tokens)
        assert torch.equal(network(tokens), found)
        assert torch.allclose(network.eval()(tokens), found, atol=1e-6)


# --------------------------------------------------------------------------- memory and precision


@pytest.mark.parametrize(
    "options", [{"rows": 2}, {"checkpoint": True}, {"rows": 3, "checkpoint": True}]
)
def test_gradients_in_pieces_and_computed_again_are_those_of_the_whole_batch(
    options, folder, tokens
):
    wanted, network = gradients(built(folder), tokens), built(folder, **options)
    layers, sizes = [], []
    layer = network.model.get_encoder().block[0].layer[0].layer_norm
    layer.register_forward_pre_hook(lambda _, args: layers.append(len(args[0])))
    network.model.register_forward_pre_hook(
        lambda _, args, named: sizes.append(len(named["input_ids"])), with_kwargs=True
    )
    with capture_features(network, network.embedding_layer) as kept:
        found = gradients(network, tokens)
    assert_close(found, wanted)
    assert [len(states) for states in kept] == [7]  # not again in the backward pass
    once = {2: [2, 2, 2, 1], 3: [3, 3, 1], None: [7]}[options.get("rows")]
    assert sizes[: len(once)] == once and len(sizes) == len(once) * (1 + ("rows" in options))
    assert len(layers) > len(once)  # something was computed again


MODELS = {
    "joint": joint,
    "reverted": partial(normalised, auxiliary="reverted", window=2),
    "restarted": partial(normalised, auxiliary="restarted", window=2),
    "bilevel": partial(bilevel, rate=0.1),
}


def steps(folder, tokens, model, weights, **options) -> tuple[list[float], dict]:
    """Potentials and parameters of a program over three steps of SGLD."""
    network = built(folder, **options)
    parts = Parts(
        network,
        weights,
        SparsityPrior(0.5, scale=1e2),
        loss=token_loss,
        prior=NormalPrior(1.0),
        head=network.embedding_layer,
    )
    kernel = SGLD(
        bind(model, parts),
        step_size={"theta": 1e-2, "w" if isinstance(weights, InstanceWeights) else "phi": 0.1},
        temperature=0.0 if model is MODELS["bilevel"] else 1.0,
        train_batch=3,
        meta_batch=2,
        generator=torch.Generator().manual_seed(0),
    )
    train, meta = (rows_of(tokens, places) for places in (slice(0, 5), slice(5, 7)))
    kernel.setup(0, Data(train, train["labels"]), Data(meta, meta["labels"]))
    potentials = []
    for _ in range(3):
        kernel.step()
        potentials.append(float(kernel.potential))
    values = {name: value.detach().clone() for name, value in network.named_parameters()}
    return potentials, values | {"w": kernel.site_values()}


@pytest.mark.parametrize("model", MODELS)
def test_programs_take_the_same_steps_in_pieces(model, folder, tokens, monkeypatch):
    """One backward pass, two over a shared graph, a companion's, and one through a step."""
    monkeypatch.setattr("bads_ppl.kernel.check_stiffness", lambda kernel: None)  # takes long
    features = SMALL["d_model"]
    kind = WeightNetwork if model == "joint" else lambda _: InstanceWeights()
    potentials, values = steps(folder, tokens, MODELS[model], kind(features))
    found, others = steps(folder, tokens, MODELS[model], kind(features), rows=2, checkpoint=True)
    assert found == pytest.approx(potentials, rel=1e-5)
    assert_close(others, values, atol=1e-4)
    assert values["w"].std() > 1e-5


def of_loss(train, meta, parts):
    """A program whose weights depend on more than embeddings."""
    forward = parts.forward(parts.sample_network(), train, meta)
    plate = train.plate("train")
    w = parts.weights.sample(train, plate, forward.features)
    with plate:
        w = pyro.deterministic("trust", w * torch.exp(-forward.train_loss), event_dim=0)


@pytest.mark.parametrize("model", [*MODELS.values(), of_loss])
def test_weights_alone_take_the_encoder_alone(model, folder, tokens, monkeypatch):
    monkeypatch.setattr("bads_ppl.kernel.check_stiffness", lambda kernel: None)  # takes long
    network, weights = built(folder, rows=2), WeightNetwork(SMALL["d_model"])
    torch.nn.init.normal_(weights.linear.weight, generator=torch.Generator().manual_seed(0))
    train = Data(tokens, tokens["labels"])
    parts = Parts(network, weights, SparsityPrior(0.5), loss=token_loss)
    generator = torch.Generator().manual_seed(0)
    kernel = SGLD(bind(model, parts), step_size=1e-3, temperature=0.0, generator=generator)
    kernel.setup(0, train, Data(tokens, tokens["labels"]))
    calls = []
    network.model.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    w = kernel.site_values()
    assert w.std() > 0.01 and not calls
    if model is of_loss:
        loss = token_loss(network(tokens), tokens["labels"])
        assert torch.allclose(kernel.site_values("trust"), w * torch.exp(-loss))
    network.embeds_alone = False
    calls.clear()
    assert torch.equal(kernel.site_values(), w) and calls


@pytest.mark.parametrize("options", [{}, {"rows": 2}, {"checkpoint": True}])
def test_lent_parameters_are_those_of_the_second_pass_too(options, folder, tokens):
    """Gradients of second order at other parameters than the network's own."""
    plain = copy.deepcopy(built(folder))
    network = copy.deepcopy(built(folder, **options))
    lent = {name: (1.5 * value).detach() for name, value in plain.named_parameters()}

    def curvature(net):
        values = {name: value.clone().requires_grad_() for name, value in lent.items()}
        loss = token_loss(functional_call(net, values, (tokens,)), tokens["labels"]).sum()
        slopes = torch.autograd.grad(loss, list(values.values()), create_graph=True)
        size = sum((slope**2).sum() for slope in slopes)
        return dict(zip(values, torch.autograd.grad(size, list(values.values())), strict=True))

    own = {name: id(value) for name, value in network.named_parameters()}
    with torch.no_grad():
        for value in plain.parameters():
            value.mul_(1.5)
    slopes = torch.autograd.grad(
        token_loss(plain(tokens), tokens["labels"]).sum(),
        list(plain.parameters()),
        create_graph=True,
    )
    size = sum((slope**2).sum() for slope in slopes)
    found = torch.autograd.grad(size, list(plain.parameters()))
    expected = dict(zip(lent, found, strict=True))
    result = curvature(network)
    scale = max(float(value.abs().max()) for value in expected.values())
    assert_close(result, expected, atol=1e-5 * scale)
    assert {name: id(value) for name, value in network.named_parameters()} == own


def test_bfloat16_changes_products_alone(folder, tokens):
    exact, network = built(folder), built(folder, precision="bfloat16", checkpoint=True, rows=4)
    output = network(tokens)
    assert output.dtype == torch.float32
    assert {value.dtype for value in network.parameters()} == {torch.float32}
    wanted = exact(tokens)
    assert not torch.allclose(output, wanted, atol=1e-4)
    assert torch.allclose(output, wanted, atol=0.1)
    found, true = gradients(network, tokens), gradients(exact, tokens)
    for name, value in true.items():
        assert functional.cosine_similarity(found[name].flatten(), value.flatten(), 0) > 0.98, name


# -------------------------------------------------------------------------------------- generation


@pytest.fixture(scope="module")
def trained(folder, tokens) -> dict[str, torch.Tensor]:
    """Values of a network that has learned when to end."""
    network = built(folder)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        token_loss(network(tokens), tokens["labels"]).mean().backward()
        optimizer.step()
    return network.state_dict()


@pytest.mark.parametrize("options", [{}, {"checkpoint": True}])
def test_generated_rows_are_those_of_the_source_alone_and_end_in_padding(
    options, folder, tokens, trained
):
    network = built(folder, **options)
    network.load_state_dict(trained)
    ids, mask = (functional.pad(tokens[name], (0, 5)) for name in ("ids", "mask"))
    found = network.generate(ids, mask, max_tokens=30)
    assert network.model.training
    assert (found[:, 0] == 0).all() and found.shape[1] <= 31
    lengths = []
    for row, ended in enumerate(found):
        alone = network.generate(ids[row : row + 1], mask[row : row + 1], max_tokens=30)[0]
        assert torch.equal(ended[: len(alone)], alone) and (ended[len(alone) :] == 0).all()
        lengths.append(len(alone))
    assert len(set(lengths)) > 1
    seen = set()
    network.model.get_decoder().register_forward_pre_hook(
        lambda _, args, named: seen.add(len(named["input_ids"])), with_kwargs=True
    )
    beams = network.generate(ids, mask, beams=3, max_tokens=4)
    assert beams.shape == (7, 5) and seen == {7 * 3}


# --------------------------------------------------------------------- where the model comes from


def test_pretrained_weights_are_taken_as_they_are(saved, folder, tokens):
    with torch.no_grad():
        found = Seq2Seq(str(saved), pretrained=True)(tokens)
        assert torch.equal(found, built(folder)(tokens))


def test_initial_values_come_from_the_global_generator(folder):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first, other = (Seq2Seq(folder, pretrained=False) for _ in range(2))
    drawn = built(folder).model.shared.weight
    assert torch.equal(first.model.shared.weight, drawn)
    assert not torch.equal(other.model.shared.weight, drawn)


def test_folders_that_lack_something_are_refused(saved, folder, tmp_path):
    with pytest.raises(InputError, match="lacks safetensors weights"):
        Seq2Seq(folder, pretrained=True)
    shutil.copytree(saved, tmp_path / "own")
    weights = load_file(saved / "model.safetensors")
    gone = "decoder.final_layer_norm.weight"
    save_file(
        {name: value for name, value in weights.items() if name != gone},
        tmp_path / "own/model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(InputError, match=f"lacks the weights of 1 parameters, .* {gone}"):
        Seq2Seq(tmp_path / "own", pretrained=True)
    about = json.loads((saved / "config.json").read_text())
    del about["decoder_start_token_id"]
    (tmp_path / "own/config.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match="has no decoder_start_token_id"):
        Seq2Seq(tmp_path / "own", pretrained=True)
    with pytest.raises(InputError, match=r"config.json of model .* cannot be read"):
        Seq2Seq(tmp_path / "none", pretrained=False)


def test_models_of_another_kind_are_refused(tmp_path):
    about = {"model_type": "bert", "vocab_size": 20, "decoder_start_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps(about))
    save_file({"none": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="no sequence-to-sequence model can be built"):
        Seq2Seq(tmp_path, pretrained=False)
    with pytest.raises(InputError, match="cannot be loaded"):
        Seq2Seq(tmp_path, pretrained=True)


def test_impossible_options_are_refused(folder, tokens):
    with pytest.raises(InputError, match="rows per pass must be at least 1, got 0"):
        built(folder, rows=0)
    with pytest.raises(InputError, match=r"precision must be .* got 'half'"):
        built(folder, precision="half")
    with pytest.raises(InputError, match="beams must be at least 1, got 0"):
        built(folder).generate(tokens["ids"], tokens["mask"], beams=0, max_tokens=3)
