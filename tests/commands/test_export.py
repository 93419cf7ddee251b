"""`helpsteer-rloo export`: what stock libraries load is the model that was trained."""

import dataclasses
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from helpsteer_rloo import cli
from helpsteer_rloo.commands import export as export_command
from helpsteer_rloo.commands.export import PROBES
from helpsteer_rloo.evaluation import reload
from helpsteer_rloo.evaluation.reload import check_reload
from helpsteer_rloo.groups import Message
from helpsteer_rloo.model.forward import score_sequences
from helpsteer_rloo.model.loading import Base, load_policy, load_reward_model
from helpsteer_rloo.rendering import Renderer
from helpsteer_rloo.run_dir import POLICY_RECORD, write_json
from tests.broken.conftest import world

__all__ = ["world"]


@pytest.fixture(scope="module")
def policy(tiny_base, tokenizer, tmp_path_factory):
    """A policy as RLOO leaves it, with an adapter that does something."""
    directory = tmp_path_factory.mktemp("policy")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    settings = {
        "rloo_k": 4, "kl_coef": 0.1, "kl_estimator": "k1", "kl_in": "reward", "learning_rate": 1e-6,
        "missing_eos_penalty": 1.0, "importance_correction": "none", "reward_functions": None, "thinking": False,
    }  # fmt: skip
    record = {
        "base_model": str(tiny_base),
        "base": dataclasses.asdict(Base(str(tiny_base))),
        "adapter": True,
        "reward_model": "models/rm",
        "settings": settings,
        "training": {"episodes": 8.0, "steps": 2},
    }
    write_json(directory / POLICY_RECORD, record)
    return directory


def sequences(tokenizer):
    renderer = Renderer(tokenizer)
    return [
        (*renderer.prompt_ids([Message("user", question)]), *renderer.continuation_ids(answer, ended=True))
        for question, answer in PROBES
    ]


@pytest.mark.parametrize("name", ["reward", "full_reward"])
def test_a_reward_model_is_exported_whole(world, tokenizer, tmp_path, capsys, name):
    source = getattr(world, name)
    cli.export([f"--model_dir={source}", f"--output_dir={tmp_path / 'out'}"])
    assert "computes scores within" in capsys.readouterr().out
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert stock.config.architectures == ["Qwen3ForSequenceClassification"]
    assert (stock.config.num_labels, stock.config.problem_type) == (1, "regression")
    own, ids = load_reward_model(source)[0], sequences(tokenizer)
    with torch.no_grad():
        found = [stock(input_ids=torch.tensor([one])).logits.item() for one in ids]
    assert found == pytest.approx(score_sequences(own, ids, 1), abs=1e-4)
    again = load_reward_model(tmp_path / "out")[0]  # and this project's own commands take it
    assert score_sequences(again, ids, 1) == pytest.approx(found, abs=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


def test_a_policy_is_exported_whole(policy, tiny_base, tokenizer, tmp_path, capsys):
    cli.export([f"--model_dir={policy}", f"--output_dir={tmp_path / 'out'}"])
    assert "computes log-probabilities within" in capsys.readouterr().out
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    start = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    trained = load_policy(Base(str(tiny_base)), adapter=policy)
    for ids in sequences(tokenizer):
        with torch.no_grad():
            found, expected, before = (
                model(input_ids=torch.tensor([ids])).logits.log_softmax(-1) for model in (stock, trained, start)
            )
        assert (found - expected).abs().max() < 1e-4
        assert (found - before).abs().max() > 1e-2
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "K = 4" in card


def test_another_type_of_weights(policy, tmp_path):
    cli.export([f"--model_dir={policy}", f"--output_dir={tmp_path / 'out'}", "--dtype=bfloat16"])
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / POLICY_RECORD).read_text())["base"]["dtype"] == "bfloat16"


def test_an_adapter_alone(policy, world, tmp_path, capsys):
    (policy / "checkpoint-2").mkdir(exist_ok=True)
    (policy / "training_args.bin").write_bytes(b"secrets")
    cli.export([f"--model_dir={policy}", f"--output_dir={tmp_path / 'out'}", "--format=adapter"])
    assert "who loads it needs that model too" in " ".join(capsys.readouterr().out.split())
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (policy / name).read_bytes()
    assert not (tmp_path / "out" / "checkpoint-2").exists()
    assert not (tmp_path / "out" / "training_args.bin").exists()
    with pytest.raises(SystemExit):
        cli.export([f"--model_dir={world.full_reward}", f"--output_dir={tmp_path / 'no'}", "--format=adapter"])
    assert "has no adapter: --format merged" in capsys.readouterr().err


def test_weights_that_are_not_the_models_are_noticed_and_not_left(policy, tmp_path, capsys, monkeypatch):
    prove = export_command._prove

    def after_damage(target, *rest, **kwargs):
        weights = load_file(target / "model.safetensors")
        weights["model.norm.weight"] *= 1.01
        save_file(weights, target / "model.safetensors", {"format": "pt"})
        return prove(target, *rest, **kwargs)

    monkeypatch.setattr(export_command, "_prove", after_damage)
    with pytest.raises(SystemExit):
        cli.export([f"--model_dir={policy}", f"--output_dir={tmp_path / 'out'}"])
    assert "The directory must not be used" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    cli.export([f"--model_dir={policy}", f"--output_dir={tmp_path / 'out'}"])  # what is left is no hindrance
    assert (tmp_path / "out" / POLICY_RECORD).exists()


def test_a_proof_sees_what_is_no_number(monkeypatch):
    monkeypatch.setattr(reload, "_in_a_fresh_process", lambda *_: [0.1, float("nan")])
    with pytest.raises(ValueError, match="must not be used"):
        check_reload("x", [], [0.1, 1.0], {"dtype": "float32"})


def test_it_is_uploaded(policy, tmp_path, monkeypatch, capsys):
    calls = []

    class Api:
        files = (".gitattributes",)

        def create_repo(self, name, **given):
            calls.append((name, given))

        def list_repo_files(self, name):
            return list(self.files)

        def upload_folder(self, **given):
            calls.append(given)
            return "https://hub/owner/name"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    cli.export(
        [f"--model_dir={policy}", f"--output_dir={tmp_path / 'out'}", "--format=adapter", "--push_to_hub=owner/name"]
    )
    assert calls[0] == ("owner/name", {"private": True, "exist_ok": True})
    assert calls[1]["folder_path"] == str(tmp_path / "out")
    assert "Uploaded to https://hub/owner/name" in capsys.readouterr().out
    Api.files = ("adapter_config.json",)
    with pytest.raises(SystemExit):
        cli.export([f"--model_dir={policy}", f"--output_dir={tmp_path / 'two'}", "--push_to_hub=owner/name"])
    assert "has files already (adapter_config.json" in capsys.readouterr().err
    assert not (tmp_path / "two").exists()


def test_a_hub_that_cannot_be_reached_is_said_before_the_work(policy, tmp_path, capsys, monkeypatch):
    class Api:
        def create_repo(self, name, **given):
            raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    with pytest.raises(SystemExit):
        cli.export([f"--model_dir={policy}", f"--output_dir={tmp_path / 'out'}", "--push_to_hub=owner/name"])
    assert "--push_to_hub owner/name: no route" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "--model_dir is missing"),
        (["--model_dir=x"], "--output_dir is missing"),
        (["--model_dir=x", "--output_dir=y", "--format=gguf"], "--format is 'gguf'; expected merged or adapter"),
        (["--model_dir=x", "--output_dir=y", "--dtype=int8"], "--dtype is 'int8'; expected float32"),
        (["--model_dir=x", "--output_dir=y", "--push_to_hub=z"], "expected OWNER/NAME"),
        (["--model_dir=x", "--output_dir=y", "--format=adapter", "--dtype=float32"], "--dtype has no effect with"),
    ],
)
def test_flags_that_cannot_be(flags, says, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.export(flags)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_a_directory_in_use_and_one_without_a_model_are_refused(policy, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    for source, target, says in (
        (policy, tmp_path, "is in use"),
        (tmp_path, tmp_path / "out", "no finished reward model or policy"),
    ):
        with pytest.raises(SystemExit):
            cli.export([f"--model_dir={source}", f"--output_dir={target}"])
        assert says in capsys.readouterr().err
