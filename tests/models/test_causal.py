"""Causal networks: log-probabilities of responses, padding, pieces, adapters, what is refused."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as functional
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.func import functional_call
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    OPTConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from bads_ppl.data import Data
from bads_ppl.errors import InputError
from bads_ppl.priors import NormalPrior, SparsityPrior
from bads_ppl.program import Parts, bind, capture_features
from bads_ppl.sgld import SGLD
from bads_ppl.weights import InstanceWeights, WeightNetwork
from models.causal import Causal, read_causal
from models.chat import SIZES, Chat, build_folder
from models.joint import joint
from models.language import IGNORED, token_loss
from models.normalised import normalised

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
ASKED = [f"What is {a} plus {b}?{' Say it.' * (a % 3)}" for a in range(6) for b in range(5)]
SAID = [f"It is {a + b}.{' Yes!' * (b % 4)}" for a in range(6) for b in range(5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "tiny", SMALL)
        return build_folder(tmp_path_factory.mktemp("cache"), ASKED + SAID, "tiny", 280)


@pytest.fixture(scope="module")
def tokens(folder) -> dict[str, torch.Tensor]:
    """Seven conversations of different lengths, two of them of two turns."""
    turns = [(("user", a), ("assistant", b)) for a, b in zip(ASKED, SAID, strict=True)]
    some = [turns[2] + turns[8], *turns[3:23:5], turns[9] + turns[5], turns[19]]
    chat = Chat(folder, 100)
    return chat.pad(chat.encode(some))


def built(folder: Path, **options) -> Causal:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Causal(folder, pretrained=False, **options)


@pytest.fixture(scope="module")
def gpt(tmp_path_factory) -> Path:
    """The folder of a GPT-2, whose positions are learned, that drops units."""
    target = tmp_path_factory.mktemp("gpt")
    size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128, "vocab_size": 280}
    drops = {"attn_pdrop": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5}
    GPT2Config(**size, **drops, bos_token_id=1, eos_token_id=1).save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory) -> Path:
    """A pretrained Llama, in bfloat16, with settings for sampling."""
    target = tmp_path_factory.mktemp("saved") / "llama"
    network = built(folder)
    network.model.bfloat16().save_pretrained(target)
    path = target / "generation_config.json"
    path.write_text(json.dumps({"do_sample": False, "temperature": 0.6, "eos_token_id": [1, 7]}))
    return target


def rows_of(tokens, places) -> dict[str, torch.Tensor]:
    return {name: value[places] for name, value in tokens.items()}


def gradients(network, tokens) -> dict[str, torch.Tensor]:
    """Of a loss that weighs the rows differently."""
    output = network(tokens)
    share = torch.linspace(0.1, 1.0, len(output))
    network.zero_grad()
    (share * token_loss(output, tokens["labels"])).sum().backward()
    return {n: value.grad.clone() for n, value in network.named_parameters() if value.requires_grad}


def assert_close(found: dict, wanted: dict, atol: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.allclose(found[name], wanted[name], rtol=1e-4, atol=atol), name
    assert max(float(value.abs().max()) for value in wanted.values()) > 1e-2


# ----------------------------------------------------------------------- losses and embeddings


@pytest.mark.parametrize("kind", ["folder", "gpt"])
def test_a_row_s_loss_hits_and_embedding_are_those_that_it_has_alone(kind, tokens, request):
    """By hand from the raw model's log-softmax, and whatever a row is padded to and with."""
    network = built(request.getfixturevalue(kind))
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(15):
        optimizer.zero_grad()
        token_loss(network(tokens), tokens["labels"]).mean().backward()
        optimizer.step()
    wider = {
        name: functional.pad(tokens[name], (0, 4), value=filler)
        for name, filler in (("ids", 9), ("mask", 0), ("labels", IGNORED))
    }
    spoilt = wider | {"ids": torch.where(wider["mask"] == 1, wider["ids"], 13)}
    with torch.no_grad(), capture_features(network) as kept:
        together, output, garbage = network(tokens), network(wider), network(spoilt)
    assert output.shape == wider["labels"].shape and torch.equal(output, garbage)
    assert torch.allclose(output[:, :-4], together, atol=1e-5)
    assert torch.equal(kept[1], kept[2]) and torch.allclose(kept[0], kept[1], atol=1e-6)
    read, hits = network.read(wider)
    losses = token_loss(output, wider["labels"])
    assert torch.allclose(read, output, atol=1e-6)
    assert hits.dtype == torch.bool and torch.equal(hits, network.read(spoilt)[1])
    for row in range(len(output)):
        length = int(tokens["mask"][row].sum())
        ids, labels = tokens["ids"][row, :length], tokens["labels"][row, :length]
        with torch.no_grad():
            logits = network.model(input_ids=ids[None]).logits[0]
        wanted = torch.zeros(length)
        likeliest = torch.zeros(length, dtype=torch.bool)
        for place in range(1, length):
            if labels[place] != IGNORED:
                wanted[place] = logits[place - 1].log_softmax(0)[ids[place]]
                likeliest[place] = logits[place - 1].argmax() == ids[place]
        assert torch.allclose(output[row, :length], wanted, atol=1e-5)
        assert (output[row, length:] == 0).all() and not hits[row, length:].any()
        assert torch.equal(hits[row, :length], likeliest)
        counted = [-float(value) for value in wanted if value != 0]
        assert len(counted) == int((labels != IGNORED).sum()) < length
        assert losses[row].item() == pytest.approx(sum(counted) / len(counted), rel=1e-5)
        matrix = network.model.get_input_embeddings().weight
        assert torch.allclose(kept[0][row], matrix[ids].mean(0), atol=1e-6)
    assert 0 < hits.sum() < (wider["labels"] != IGNORED).sum() and kept[0].std(0).min() > 1e-4
    assert network.embedding_layer.in_features == kept[0].shape[1] == 16


def test_the_end_of_a_response_counts_and_its_prompt_does_not(folder, tokens):
    network = built(folder)
    with torch.no_grad():
        output = network(tokens)
    prompts = (tokens["labels"] == IGNORED) & (tokens["mask"] == 1)
    ends = (tokens["labels"] == 1) & (output < 0)
    assert (output[prompts] == 0).all() and prompts.sum(1).min() > 5
    assert ends.sum(1).tolist() == [2, 1, 1, 1, 1, 2, 1]
    other = tokens["labels"].masked_fill(tokens["labels"] == 1, IGNORED)
    with torch.no_grad():
        found = network(tokens | {"labels": other})
    assert torch.allclose(found, output.masked_fill(tokens["labels"] == 1, 0.0), atol=1e-6)


def test_nothing_counts_at_the_first_place_or_without_labels(folder, tokens):
    network = built(folder)
    none = torch.full_like(tokens["labels"], IGNORED)
    first = none.clone()
    first[:, 0] = tokens["ids"][:, 0]
    for labels in (none, first):
        assert (network(tokens | {"labels": labels}) == 0).all()
        assert not network.read(tokens | {"labels": labels})[1].any()


def test_logits_are_those_of_labels_alone_and_the_same_where_a_model_gives_all(folder, tokens):
    network, seen, masks = built(folder), [], []
    network.model.lm_head.register_forward_hook(lambda _, args, out: seen.append(out.shape[:2]))
    network.model.register_forward_pre_hook(
        lambda _, args, named: masks.append(named["attention_mask"]), with_kwargs=True
    )
    wide = {name: functional.pad(value, (0, 50), value=IGNORED * (name == "labels"))
            for name, value in tokens.items()}  # fmt: skip
    short = rows_of(wide, slice(1, 5))
    found = network(short)
    columns = int((short["labels"] != IGNORED).any(0).sum())
    network._chooses = False
    assert torch.allclose(network(short), found, atol=1e-6)
    longest = int(short["mask"].sum(1).max())
    assert seen == [(4, columns), (4, longest)] and columns < longest
    assert all(torch.equal(mask, short["mask"][:, :longest]) for mask in masks)


def test_an_embedding_may_be_narrower_than_the_model_s_states(tmp_path, tokens):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16}
    OPTConfig(vocab_size=280, word_embed_proj_dim=8, **size).save_pretrained(tmp_path)
    network = built(tmp_path)
    with capture_features(network) as kept:
        network(tokens)
    assert kept[0].shape == (7, 8) and network.embedding_layer.in_features == 8


@pytest.mark.parametrize("mode", [True, False])
def test_dropout_stays_off_in_training(mode, gpt, tokens):
    network = built(gpt).train(mode)
    with torch.no_grad():
        found = network(tokens)
        assert torch.equal(network(tokens), found)
        assert torch.allclose(network.train(not mode)(tokens), found, atol=1e-6)
    assert built(gpt).model.training


# --------------------------------------------------------------------------- memory and precision


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
    assert widths == sorted(widths) and len(widths) == 4 and len(set(widths)) > 2
    assert torch.equal(pieces.read(tokens)[1], whole.read(tokens)[1])


@pytest.mark.parametrize("tune", ["full", "lora"])
@pytest.mark.parametrize(
    "options", [{"rows": 2}, {"checkpoint": True}, {"rows": 3, "checkpoint": True}]
)
def test_gradients_in_pieces_and_computed_again_are_those_of_the_whole_batch(
    options, tune, folder, tokens
):
    whole, network = (built(folder, tune=tune, **more) for more in ({}, options))
    if tune == "lora":
        for one in (whole, network):
            stirred(one)
    wanted, layers = gradients(whole, tokens), []
    network.model.model.layers[0].mlp.register_forward_pre_hook(
        lambda _, args: layers.append(len(args[0]))
    )
    with capture_features(network) as kept:
        found = gradients(network, tokens)
    assert_close(found, wanted)
    assert [len(states) for states in kept] == [7]
    once = {2: [2, 2, 2, 1], 3: [3, 3, 1], None: [7]}[options.get("rows")]
    assert layers[: len(once)] == once and len(layers) >= 2 * len(once)  # computed again


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_embeddings_alone_take_no_layer(tune, folder, tokens):
    network, layers = built(folder, tune=tune, rows=3), []
    network.model.get_decoder().layers[0].register_forward_hook(lambda *_: layers.append(1))
    with torch.no_grad(), capture_features(network) as kept:
        found = network(tokens, embedding_only=True)
        assert not layers
        network(tokens)
    assert torch.equal(found, kept[1]) and torch.equal(found, kept[0]) and layers


MODELS = {"joint": joint, "restarted": partial(normalised, auxiliary="restarted", window=2)}


def steps(folder, tokens, model, **options) -> tuple[list[float], dict]:
    """Potentials and parameters of a program over three steps of SGLD."""
    network = built(folder, **options)
    weights = WeightNetwork(16) if model is joint else InstanceWeights()
    parts = Parts(
        network, weights, SparsityPrior(0.5, scale=1e2), loss=token_loss, prior=NormalPrior(1.0)
    )
    kernel = SGLD(
        bind(model, parts),
        step_size={"theta": 1e-2, "phi" if model is joint else "w": 0.1},
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


@pytest.mark.parametrize("tune", ["full", "lora"])
@pytest.mark.parametrize("model", MODELS)
def test_programs_take_the_same_steps_in_pieces(model, tune, folder, tokens, monkeypatch):
    monkeypatch.setattr("bads_ppl.kernel.check_stiffness", lambda kernel: None)  # takes long
    potentials, values = steps(folder, tokens, MODELS[model], tune=tune)
    found, others = steps(folder, tokens, MODELS[model], tune=tune, rows=2, checkpoint=True)
    assert found == pytest.approx(potentials, rel=1e-5)
    assert_close(others, values, atol=1e-4)
    moved = {n for n, value in built(folder, tune=tune).named_parameters()
             if not torch.equal(value, values[n])}  # fmt: skip
    assert moved == {n for n in values if n != "w" and (tune == "full" or "lora" in n)}
    assert values["w"].std() > 1e-5


@pytest.mark.parametrize("options", [{}, {"rows": 2, "checkpoint": True}])
def test_a_companion_shares_what_is_frozen_and_steps_are_the_same(
    options, folder, tokens, monkeypatch
):
    monkeypatch.setattr("bads_ppl.kernel.check_stiffness", lambda kernel: None)
    network = built(folder, tune="lora")
    parts = Parts(network, InstanceWeights())
    pairs = zip(network.parameters(), parts.auxiliary.parameters(), strict=True)
    assert all((other is one) == (not one.requires_grad) for one, other in pairs)
    found, values = steps(folder, tokens, MODELS["restarted"], tune="lora", **options)
    monkeypatch.setattr("bads_ppl.program.copied", copy.deepcopy)
    wanted, others = steps(folder, tokens, MODELS["restarted"], tune="lora", **options)
    assert found == wanted and all(torch.equal(values[n], others[n]) for n in values)
    fixed = {n: v for n, v in network.named_parameters() if not v.requires_grad}
    assert all(torch.equal(values[name], value) for name, value in fixed.items())


@pytest.mark.parametrize("options", [{}, {"rows": 2}, {"checkpoint": True}])
def test_lent_parameters_are_those_of_the_second_pass_too(options, folder, tokens):
    plain, network = built(folder), copy.deepcopy(built(folder, **options))
    lent = {n: (1.5 * v).detach().requires_grad_() for n, v in network.named_parameters()}
    with torch.no_grad():
        for value in plain.parameters():
            value.mul_(1.5)
    output = functional_call(network, lent, (tokens,))
    found = torch.autograd.grad(token_loss(output, tokens["labels"]).sum(), list(lent.values()))
    loss = token_loss(plain(tokens), tokens["labels"]).sum()
    wanted = torch.autograd.grad(loss, list(plain.parameters()))
    assert_close(dict(zip(lent, found, strict=True)), dict(zip(lent, wanted, strict=True)), 1e-5)


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


# ---------------------------------------------------------------------------------- what is trained


def stirred(network: Causal) -> Causal:
    """A network whose parameters that are trained have moved."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in network.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return network


def test_an_adapter_alone_is_trained_and_changes_nothing_before(folder, tokens):
    network, full = built(folder, tune="lora", rank=3), built(folder)
    trained = {n: value for n, value in network.named_parameters() if value.requires_grad}
    layers = 2 * 3 * (4 * (16 + 16) + 3 * (16 + 24))
    assert all("lora_" in name for name in trained)
    assert sum(value.numel() for value in trained.values()) == layers
    with torch.no_grad():
        assert torch.allclose(network(tokens), full(tokens), atol=1e-6)
    token_loss(network(tokens), tokens["labels"]).sum().backward()
    assert {n for n, v in network.named_parameters() if v.grad is not None} == set(trained)
    assert all(value.requires_grad for value in full.parameters())


def test_a_saved_model_gives_the_same_outputs(saved, tokens, tmp_path):
    network = stirred(Causal(saved, pretrained=True))
    network.save(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    again = Causal(tmp_path, pretrained=True)
    with torch.no_grad():
        assert torch.equal(again(tokens), network(tokens))
        assert not torch.allclose(Causal(saved, pretrained=True)(tokens), again(tokens), atol=1e-2)
    assert {value.dtype for value in again.parameters()} == {torch.float32}
    about = json.loads((tmp_path / "generation_config.json").read_text())
    assert about["eos_token_id"] == [1, 7] and "temperature" not in about


@pytest.mark.parametrize("kind", ["saved", "gpt"])
def test_a_saved_adapter_gives_the_same_outputs_in_peft(kind, tokens, tmp_path, request):
    base = request.getfixturevalue(kind)
    if kind == "gpt":
        built(base).save(tmp_path)
        base = tmp_path
    network = stirred(Causal(base, pretrained=True, tune="lora", rank=2))
    folders = [tmp_path / "first", tmp_path / "second"]
    for target in folders:
        target.mkdir()
        network.save(target)
        assert {path.name for path in target.iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
    texts = [(target / "adapter_config.json").read_text() for target in folders]
    about = json.loads(texts[0])
    assert texts[0] == texts[1] and about["target_modules"] == sorted(about["target_modules"])
    assert (about["r"], about["task_type"]) == (2, "CAUSAL_LM")
    assert about["base_model_name_or_path"] == str(base)
    raw = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(raw, folders[0]).eval()
    inputs = {"input_ids": tokens["ids"], "attention_mask": tokens["mask"]}
    seen = tokens["mask"] == 1
    with torch.no_grad():
        found, wanted = adapted(**inputs).logits, network.model(**inputs).logits
        with adapted.disable_adapter():
            without = adapted(**inputs).logits
    assert torch.allclose(found[seen], wanted[seen], atol=1e-5)
    assert not torch.allclose(without[seen], wanted[seen], atol=1e-2)
    assert network.model.peft_config["default"].inference_mode is False  # still to be trained


def test_a_base_that_is_saved_with_its_adapter_is_found_beside_it(folder, tokens, tmp_path):
    network, plain = stirred(built(folder, tune="lora", rank=2)), built(folder)
    (tmp_path / "made" / "base").mkdir(parents=True)
    network.save_base(tmp_path / "made" / "base")
    network.save(tmp_path / "made", base="/no/longer/there")
    Chat(folder, 100).save_tokenizer(tmp_path / "made" / "base")
    again = Causal(tmp_path / "made" / "base", pretrained=True)
    with torch.no_grad():
        assert torch.equal(again(tokens), plain(tokens))
    (tmp_path / "made").rename(tmp_path / "moved")
    model, _ = read_causal(tmp_path / "moved")
    inputs = {"input_ids": tokens["ids"], "attention_mask": tokens["mask"]}
    with torch.no_grad():
        found, wanted = model(**inputs).logits, network.model(**inputs).logits
    seen = tokens["mask"] == 1
    assert torch.allclose(found[seen], wanted[seen], atol=1e-5)
    assert not torch.allclose(plain.model(**inputs).logits[seen], wanted[seen], atol=1e-2)


# ------------------------------------------------------------------------------ what is refused


def test_initial_values_come_from_the_global_generator(folder):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first, other = (Causal(folder, pretrained=False) for _ in range(2))
    weights = [net.model.lm_head.weight for net in (built(folder), first, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_weights_that_are_not_there_are_not_made_up(saved, folder, tmp_path):
    with pytest.raises(InputError, match="lacks safetensors weights"):
        Causal(folder, pretrained=True)
    gone = "model.norm.weight"
    weights = load_file(saved / "model.safetensors")
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    save_file(
        {name: value for name, value in weights.items() if name != gone},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(InputError, match=f"lacks the weights of 1 parameters, .* {gone}"):
        Causal(tmp_path, pretrained=True)


@pytest.mark.parametrize("pretrained", [True, False])
def test_models_that_see_what_follows_are_refused(pretrained, tmp_path):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        BertForMaskedLM(BertConfig(intermediate_size=16, vocab_size=280, **size)).save_pretrained(
            tmp_path
        )
    with pytest.raises(InputError, match="is no causal language model"):
        Causal(tmp_path, pretrained=pretrained)


def test_models_with_an_encoder_are_refused(tmp_path):
    size = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_heads": 2, "num_layers": 1}
    with torch.random.fork_rng():
        T5ForConditionalGeneration(T5Config(vocab_size=20, **size)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"no causal language model can be built .* of a Llama"):
        Causal(tmp_path, pretrained=False)
    with pytest.raises(InputError, match="cannot be loaded"):
        Causal(tmp_path, pretrained=True)


def test_impossible_options_are_refused(folder):
    for options, message in (
        ({"rows": 0}, "rows per pass must be at least 1, got 0"),
        ({"precision": "half"}, "precision must be .* got 'half'"),
        ({"tune": "frozen"}, "tune must be full or lora, got 'frozen'"),
        ({"tune": "lora", "rank": 0}, "rank must be at least 1, got 0"),
    ):
        with pytest.raises(InputError, match=message):
            built(folder, **options)
