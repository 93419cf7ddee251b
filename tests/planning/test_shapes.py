"""Dimensions, and the counts that follow from them, against transformers' own models and torch's counter."""

import json
import time

import huggingface_hub.constants
import peft
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification

from benchmarks import models
from helpsteer_rloo import hub
from helpsteer_rloo.hub import absence, network_error
from helpsteer_rloo.planning.memory import Adapter
from helpsteer_rloo.planning.request import Trained
from helpsteer_rloo.planning.shapes import (
    QWEN3,
    Shape,
    Work,
    backward_flops,
    forward_flops,
    head_flops,
    shape_of,
    shape_of_config,
)
from helpsteer_rloo.planning.time import step_flops
from tests.test_hub import SHA, answering, at, content, sending

# Weights outside of the embeddings, in billions, as the models' cards give them.
PUBLISHED = {"0.6B": 0.44, "1.7B": 1.4, "4B": 3.6, "8B": 6.95, "14B": 13.2, "32B": 31.2}


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("size", PUBLISHED)
def test_every_built_in_model_has_the_weights_of_transformers_own(size):
    shape = QWEN3[f"Qwen/Qwen3-{size}"]
    assert QWEN3[f"Qwen/Qwen3-{size}-Base"] == shape == shape_of(f"Qwen/Qwen3-{size}")
    with torch.device("meta"):
        causal = Qwen3ForCausalLM(models.make_config(shape))
        classifier = Qwen3ForSequenceClassification(models.make_config(shape, labels=1))
    assert (shape.causal_parameters(), shape.classifier_parameters()) == (count(causal), count(classifier))
    outside = shape.classifier_parameters() - shape.embedding_parameters()
    assert outside / 1e9 == pytest.approx(PUBLISHED[size], rel=0.015)


def test_adapters_have_pefts_weights():
    shape = QWEN3["Qwen/Qwen3-0.6B"]
    for targets in (None, ["q_proj", "v_proj"]):
        with torch.device("meta"):
            config = models.make_lora("CAUSAL_LM")
            config.target_modules = targets or config.target_modules
            model = peft.get_peft_model(Qwen3ForCausalLM(models.make_config(shape)), config)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        assert shape.lora_parameters(models.LORA_RANK, targets) == trained


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (Qwen3Config(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                     intermediate_size=80, vocab_size=100, head_dim=16, tie_word_embeddings=True), Qwen3ForCausalLM),
        (LlamaConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                     intermediate_size=80, vocab_size=100), LlamaForCausalLM),
    ],
    ids=["qwen3", "llama"],
)  # fmt: skip
def test_a_local_model_is_known_by_its_configuration(config, model, tmp_path):
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        assert shape_of(str(tmp_path)).causal_parameters() == count(model(config))


def test_llama_without_key_heads_or_head_size_has_those_of_its_heads():
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 9}
    shape = shape_of_config({"model_type": "llama", **sizes, "vocab_size": 10})
    assert (shape.kv_heads, shape.head_dim, shape.head_norms, shape.tied) == (4, 16, False, False)


LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 8,
    "vocab_size": 8,
}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[]", "holds no mapping"),
        (json.dumps({"model_type": "gpt2"}), "model_type is 'gpt2'; the plan knows qwen3 and llama"),
        (
            json.dumps({"model_type": "qwen3", "hidden_size": "large"}),
            "hidden_size is 'large'; expected a whole number",
        ),
        (json.dumps({"model_type": "qwen3", "hidden_size": 8}), "num_hidden_layers is None"),
        ("[" * 100_000, "is not JSON"),
        (json.dumps(LLAMA | {"hidden_size": 10**400}), "expected a whole number from 1 to 1,000,000,000"),
        (json.dumps(LLAMA | {"num_key_value_heads": 3}), "num_key_value_heads is 3; expected a divisor of the 4 heads"),
        (json.dumps(LLAMA | {"hidden_size": 2}), "hidden_size is 2; expected at least that of the 4 heads"),
        (
            json.dumps(LLAMA | {"tie_word_embeddings": "false"}),
            "tie_word_embeddings is 'false'; expected true",
        ),
    ],
)
def test_a_model_that_is_not_known_is_refused_by_name(content, says, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config") as raised:
        shape_of(str(tmp_path))
    assert says in str(raised.value)


def test_a_model_of_the_hub_that_cannot_be_reached_is_refused_with_what_to_give(monkeypatch):
    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("helpsteer_rloo.planning.shapes.absence", lambda *_: None)
    monkeypatch.setattr("helpsteer_rloo.planning.shapes.refusal", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(
        ValueError, match=r"'some/model' are not known.*cannot be had \(OSError\).*--model_name_or_path"
    ):
        shape_of("some/model")


def test_a_hub_that_is_away_is_not_waited_for(monkeypatch):
    asked = []

    def cached(name, file, revision, local_files_only):
        asked.append(local_files_only)
        raise OSError("not in the cache")

    monkeypatch.setattr("helpsteer_rloo.planning.shapes.absence", lambda *_: "ConnectError: away")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", cached)
    with pytest.raises(ValueError, match=r"the hub cannot be reached \(ConnectError\)"):
        shape_of("some/model")
    assert asked == [True]


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (401, "", "the hub has no model of that name, or it is private"),
        (404, "RepoNotFound", "the hub has no model of that name, or it is private"),
        (404, "RevisionNotFound", "the hub has no revision None of it"),
        (403, "GatedRepo", "the hub gives it to those alone who were granted access"),
        (429, "", "the hub answers with status 429"),
        (503, "", "the hub answers with status 503"),
    ],
)
def test_what_the_hub_has_against_a_model_is_said_once_and_at_once(status, code, says, monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    absence.cache_clear()
    begin = time.monotonic()
    with answering(status, code) as port:
        at(monkeypatch, port)
        with pytest.raises(ValueError, match="Give another --model_name_or_path") as raised:
            shape_of("Qwen/Qwen3-8b")
    absence.cache_clear()
    assert time.monotonic() - begin < 5  # the hub's own functions try again for half a minute
    assert says in str(raised.value)
    assert "Did you mean 'Qwen/Qwen3-8B'?" in str(raised.value)
    assert "http" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("error", [network_error()("peer closed connection"), AttributeError("'list' has no 'get'")])
def test_a_configuration_that_breaks_off_or_is_odd_is_said(error, monkeypatch):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr("helpsteer_rloo.planning.shapes.absence", lambda *_: None)
    monkeypatch.setattr("helpsteer_rloo.planning.shapes.refusal", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", broken)
    with pytest.raises(ValueError, match=rf"its config.json cannot be had \({type(error).__name__}\)"):
        shape_of("some/model")


def test_a_configuration_that_never_comes_is_said_at_once(monkeypatch, capfd, tmp_path):
    about = json.dumps({"id": "a/b", "sha": SHA, "siblings": [], "private": False, "tags": []}).encode()

    def answer(sent):
        if "/api/models" in sent.path:
            content(sent, about)
        else:
            time.sleep(4)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "SECONDS", 1.5)
    absence.cache_clear()
    begin = time.monotonic()
    with sending(answer) as port:
        at(monkeypatch, port)
        template = f"http://127.0.0.1:{port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        with pytest.raises(ValueError, match=r"its config.json cannot be had \(TimeoutError\)"):
            shape_of("a/b")
    absence.cache_clear()
    assert time.monotonic() - begin < 4
    assert "Retry" not in capfd.readouterr().err


def test_a_name_that_no_model_can_have_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="the hub has no such names"):
        shape_of("no/such/model")


SHAPE = Shape(64, 2, 4, 2, 16, 128, 512)
TOKENS = 48


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_operations_are_those_that_torch_counts(lora):
    model = models.make_policy(SHAPE, torch.float32, 0)
    adapted = peft.get_peft_model(model, models.make_lora("CAUSAL_LM")) if lora else model
    if lora:
        adapted.enable_input_require_grads()
    model.set_attn_implementation("eager")  # whose square the counter sees
    with FlopCounterMode(display=False) as forward:
        hidden = model.model(input_ids=torch.arange(2, 2 + TOKENS)[None], use_cache=False).last_hidden_state
    with FlopCounterMode(display=False) as backward:
        hidden.sum().backward()
    work, adapter = Work(TOKENS, TOKENS * TOKENS), SHAPE.lora_parameters(16) if lora else 0
    assert forward_flops(SHAPE, work, adapter) == pytest.approx(forward.get_total_flops(), rel=0.01)
    assert backward_flops(SHAPE, work, adapter) == pytest.approx(backward.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("cpu", [False, True], ids=["gpu", "cpu"])
def test_a_training_pass_is_counted_with_its_head_and_what_is_computed_again(lora, checkpointing, cpu):
    trained = Trained("x", SHAPE, 4, 4, Adapter(16) if lora else None, checkpointing, 8, packed=True)
    work, adapter = Work.of_group(10, [6, 6]), SHAPE.lora_parameters(16) if lora else 0
    again = 2 * (SHAPE.body_parameters() + adapter) * work.tokens if cpu else forward_flops(SHAPE, work, adapter)
    body = forward_flops(SHAPE, work, adapter) + checkpointing * again + backward_flops(SHAPE, work, adapter)
    # a frozen head: value and gradient of its input; a trained one: run twice, gradients of input and weights
    assert step_flops(trained, work, 12, cpu=cpu) == body + (2 if lora else 4) * head_flops(SHAPE, 12)
