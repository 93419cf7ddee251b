import itertools
import threading
import weakref
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import chisquare
from torch.nn.modules.module import register_module_forward_hook
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from helpsteer_rloo.model import cascade, rollout
from helpsteer_rloo.model.attention import SHARED_PREFIX, use_shared_prefix
from helpsteer_rloo.model.drawing import Drawn
from helpsteer_rloo.model.loading import end_ids
from helpsteer_rloo.model.rollout import (
    Sampling,
    _cut_at_end,
    _generate,
    sample,
    sample_groups,
    sequence_seed,
    stream,
    supports_sampler,
)

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
    "initializer_range": 0.3,
}
PROMPTS = [[5, 6, 7], [15], list(range(1, 42)), [8, 9], [5, 6, 7], [10, 11, 12, 13, 14]]
SEEDS = [[sequence_seed(1, index, number) for number in range(count)] for index, count in enumerate((4, 2, 1, 0, 9, 3))]
FREE = Sampling(max_new_tokens=14, temperature=1.0, top_p=1.0, top_k=0, end_ids=(5, 6))


def norm_in_float64(self, hidden_states):
    """Root-mean-square norm without transformers' detour through float32, which would hide what is compared."""
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))


def build(name, **changes):
    torch.manual_seed(0)
    if name == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**SIZES | changes))
    return LlamaForCausalLM(LlamaConfig(**SIZES | changes))


def with_lora(model, **changes):
    policy = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **changes))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return policy


@pytest.fixture(params=["qwen3", "llama"])
def exact_model(request, monkeypatch):
    monkeypatch.setattr(modeling_qwen3.Qwen3RMSNorm, "forward", norm_in_float64)
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", norm_in_float64)
    return build(request.param).double()


@pytest.fixture(params=["qwen3", "llama"])
def model(request):
    return build(request.param, tie_word_embeddings=request.param == "qwen3")


def ids_of(groups):
    return [[completion.ids for completion in group] for group in groups]


@torch.no_grad()
def furthest(model, prompts, groups, temperature=1.0):
    """The largest difference between the log-probabilities recorded and those of plain forwards."""
    model.eval()
    differences = [0.0]
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            logits = model(input_ids=torch.tensor([[*prompt, *completion.ids]])).logits[0, len(prompt) - 1 : -1]
            log_probs = (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(completion.ids)[:, None])[:, 0]
            differences.append((log_probs - torch.tensor(completion.log_probs, dtype=torch.float64)).abs().max().item())
    return max(differences)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_equal_plain_unpadded_forwards(exact_model, temperature):
    sampling = Sampling(14, temperature, 1.0, 0, (5, 6))
    groups = sample_groups(exact_model, PROMPTS, SEEDS, sampling, rows=8)
    assert [len(group) for group in groups] == [4, 2, 1, 0, 9, 3]
    assert furthest(exact_model, PROMPTS, groups, temperature) < 1e-9


def test_log_probabilities_are_right_in_float32_and_close_in_bfloat16(model):
    assert furthest(model, PROMPTS, sample_groups(model, PROMPTS, SEEDS, FREE, rows=64)) < 2e-5
    model.bfloat16()
    assert furthest(model, PROMPTS, sample_groups(model, PROMPTS, SEEDS, FREE, rows=64)) < 0.15


def test_neither_chunks_nor_order_change_a_completion(model):
    expected = ids_of(sample_groups(model, PROMPTS, SEEDS, FREE, rows=64))
    for rows in (1, 3, 8):
        assert ids_of(sample_groups(model, PROMPTS, SEEDS, FREE, rows=rows)) == expected
    backwards = ids_of(sample_groups(model, PROMPTS[::-1], SEEDS[::-1], FREE, rows=8))
    assert backwards[::-1] == expected
    assert len(set(itertools.chain(*expected))) > 15


@pytest.mark.parametrize("block_cost", [0, 3, 10**6])
def test_caches_that_grow_and_are_cut_by_length_stay_right(exact_model, block_cost, monkeypatch):
    monkeypatch.setattr("helpsteer_rloo.model.cascade.BLOCK_COST", block_cost)
    monkeypatch.setattr("helpsteer_rloo.model.cascade.FIRST_TOKENS", 2)
    monkeypatch.setattr("helpsteer_rloo.model.cascade.ROW_TOKENS", 10)
    groups = sample_groups(exact_model, PROMPTS, SEEDS, FREE, rows=64)
    assert furthest(exact_model, PROMPTS, groups) < 1e-9


def test_caches_of_prompts_without_rows_are_let_go(model, monkeypatch):
    monkeypatch.setattr("helpsteer_rloo.model.cascade.BLOCK_COST", 0)
    alive, read = [], cascade.read_prompts

    def watched(*args):
        prefill, hidden = read(*args)
        alive.extend(weakref.ref(cache) for caches in prefill.caches for pair in caches.values() for cache in pair)
        return prefill, hidden

    at_the_end = []
    draw = rollout.draw
    monkeypatch.setattr(rollout, "read_prompts", watched)
    monkeypatch.setattr(
        rollout, "draw", lambda *a, **k: at_the_end.append(sum(r() is not None for r in alive)) or draw(*a, **k)
    )
    sampling = Sampling(40, 1.0, 1.0, 0, tuple(range(12)))
    sample_groups(model, PROMPTS, SEEDS, sampling, rows=64)
    assert at_the_end[0] == len(alive) > at_the_end[-1]


@pytest.mark.parametrize("truncation", [{"temperature": 1e-4}, {"top_k": 1}])
def test_the_most_likely_tokens_are_those_of_greedy_generate(model, truncation):
    sampling = Sampling(
        **{"max_new_tokens": 14, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "end_ids": ()} | truncation
    )
    groups = sample_groups(model, PROMPTS, [[7]] * len(PROMPTS), sampling, rows=4)
    for prompt, (completion,) in zip(PROMPTS, groups, strict=True):
        ids = torch.tensor([prompt])
        greedy = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=14)
        assert list(completion.ids) == greedy[0, len(prompt) :].tolist()
        assert completion.log_probs == pytest.approx([0.0] * 14, abs=1e-3)
        assert not completion.ended


@pytest.fixture
def tokens_read(model):
    """Shapes of the ids that go through the model's embedding."""
    shapes = []
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    yield shapes
    handle.remove()


def test_rows_that_have_ended_leave(model, tokens_read):
    sampling = Sampling(40, 1.0, 1.0, 0, tuple(range(12)))
    (group, _) = sample_groups(model, [[3], [4, 5]], [list(range(24)), list(range(8))], sampling, rows=32)
    lengths = sorted(len(completion.ids) for completion in group)
    steps = [rows for rows, _ in tokens_read[1:]]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] <= 32
    assert len(steps) < 40
    assert sum(steps) < 0.75 * 32 * len(steps)
    assert lengths[0] < lengths[-1]
    for completion in group:
        assert completion.ended == (completion.ids[-1] < 12)
        assert all(token >= 12 for token in completion.ids[:-1])
        assert len(completion.log_probs) == len(completion.ids)


def test_a_prompt_is_read_once_for_all_of_its_completions(model, tokens_read):
    sample_groups(model, PROMPTS, SEEDS, Sampling(3, 1.0, 1.0, 0, ()), rows=64)
    assert tokens_read == [(1, 41 + 5 + 3 + 1), (19, 1), (19, 1)]  # the prompt without seeds is not read at all


def test_a_stock_model_decodes_without_its_own_forward(model, monkeypatch):
    calls, forward = [], type(model.model).forward
    monkeypatch.setattr(
        type(model.model), "forward", lambda self, *args, **kwargs: calls.append(1) or forward(self, *args, **kwargs)
    )
    sample_groups(model, PROMPTS, SEEDS, Sampling(3, 1.0, 1.0, 0, ()), rows=64)
    assert len(calls) == 1  # the prompts


def halved(module, args, output):
    output.last_hidden_state = output.last_hidden_state * 0.5
    return output


@pytest.mark.parametrize(
    "attach",
    [
        lambda model: model.model.layers[1].mlp.register_forward_hook(lambda _, args, output: output * 0.5),
        lambda model: model.model.register_forward_hook(halved),
        lambda model: register_module_forward_hook(
            lambda module, _, output: output * 1.1 if type(module).__name__.endswith("MLP") else None
        ),
    ],
    ids=["layer", "body", "everywhere"],
)
def test_a_model_with_hooks_runs_its_own_forward(exact_model, attach):
    handle = attach(exact_model)
    try:
        assert furthest(exact_model, PROMPTS, sample_groups(exact_model, PROMPTS, SEEDS, FREE, rows=64)) < 1e-9
    finally:
        handle.remove()


def test_only_the_layers_that_the_configuration_counts_are_run(model):
    model.config.num_hidden_layers = 1
    assert furthest(model, PROMPTS, sample_groups(model, PROMPTS, SEEDS, FREE, rows=64)) < 2e-5


def test_an_end_without_a_usable_embedding_spoils_nothing(model):
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # untied
        model.model.embed_tokens.weight[list(FREE.end_ids)] = torch.nan
    groups = sample_groups(model, [[15, 3, 4]], [list(range(16))], FREE, rows=64)
    assert any(completion.ended and len(completion.ids) < 8 for completion in groups[0])


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotations_that_depend_on_the_longest_sequence_are_left_to_generate(kind):
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 32}
    rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4} | (factors if kind == "longrope" else {})
    assert not supports_sampler(build("qwen3", rope_parameters=rope, max_position_embeddings=32))


def test_threads_take_turns(model):
    threads = [
        threading.Thread(target=sample_groups, args=(model, PROMPTS, SEEDS, FREE), kwargs={"rows": 64})
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"temperature": -1.0}, {"top_p": float("nan")}, {"top_k": -1}])
def test_what_is_no_distribution_is_refused(wrong):
    with pytest.raises(ValueError, match="temperature > 0, 0 < top_p <= 1 and top_k >= 0"):
        replace(FREE, **wrong)


def test_another_norm_is_not_taken_for_a_root_mean_square(model):
    for layer in model.model.layers:
        layer.input_layernorm = torch.nn.LayerNorm(32)
    assert furthest(model, PROMPTS, sample_groups(model, PROMPTS, SEEDS, FREE, rows=64)) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_counts_as_merged_and_stays_as_it_was(dtype):
    policy = with_lora(build("qwen3"), lora_dropout=0.5).to(dtype).train()
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    groups = sample_groups(policy, PROMPTS, SEEDS, FREE, rows=64)
    after = policy.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert policy.training
    merged = policy.float().merge_and_unload()
    assert furthest(merged, PROMPTS, groups) < (2e-5 if dtype == torch.float32 else 0.3)


def test_a_disabled_adapter_is_not_sampled():
    policy = with_lora(build("qwen3"))
    with policy.disable_adapter():
        without = sample_groups(policy, PROMPTS, SEEDS, FREE, rows=64)
    assert ids_of(without) == ids_of(sample_groups(build("qwen3"), PROMPTS, SEEDS, FREE, rows=64))
    assert ids_of(without) != ids_of(sample_groups(policy, PROMPTS, SEEDS, FREE, rows=64))


def test_everything_is_put_back_after_an_exception_in_the_middle(monkeypatch):
    policy = with_lora(build("qwen3", attention_dropout=0.1)).train()
    inner = policy.get_base_model()
    inner.gradient_checkpointing_enable({"use_reentrant": False})
    inner.enable_input_require_grads()
    inner.model.layers[0].eval()
    modes = [module.training for module in policy.modules()]
    calls = []

    def fails(logits_RV, uniform_R, **kwargs):
        calls.append("forward" in inner.model.layers[0].mlp.up_proj.__dict__)
        if len(calls) == 3:
            raise RuntimeError("in the middle")
        return Drawn(logits_RV.argmax(-1), logits_RV.amax(-1), logits_RV.amax(-1))

    monkeypatch.setattr("helpsteer_rloo.model.rollout.draw", fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        sample_groups(policy, PROMPTS, SEEDS, FREE, rows=64)
    assert calls == [True] * 3
    assert [module.training for module in policy.modules()] == modes
    assert not any("forward" in module.__dict__ for module in policy.modules())
    assert policy.active_adapter == "default"
    assert inner.config._attn_implementation == "sdpa"
    assert policy(input_ids=torch.tensor([[1, 2]])).logits.requires_grad


def test_a_model_in_training_with_checkpointing_is_sampled_as_in_evaluation():
    policy = with_lora(build("qwen3", attention_dropout=0.1), lora_dropout=0.5)
    expected = ids_of(sample_groups(policy.eval(), PROMPTS, SEEDS, FREE, rows=64))
    policy.train().gradient_checkpointing_enable({"use_reentrant": False})
    policy.enable_input_require_grads()
    groups = sample_groups(policy, PROMPTS, SEEDS, FREE, rows=64)
    assert ids_of(groups) == expected
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sample_groups(policy, PROMPTS, SEEDS, FREE, rows=64) == groups


def test_an_attention_that_is_set_already_stays_set(model):
    use_shared_prefix(model)
    sample_groups(model, [[3]], [[0]], FREE, rows=1)
    assert model.config._attn_implementation == SHARED_PREFIX


def test_what_cannot_be_sampled_is_refused(model):
    with pytest.raises(ValueError, match="one token in every prompt"):
        sample_groups(model, [[3], []], [[0], [1]], FREE, rows=4)
    with pytest.raises(ValueError, match="at least one row"):
        sample_groups(model, [[3]], [[0]], FREE, rows=0)
    with pytest.raises(ValueError, match="one new token"):
        sample_groups(model, [[3]], [[0]], replace(FREE, max_new_tokens=0), rows=1)
    with pytest.raises(ValueError, match="one token in every prompt"):
        stream(model, [], 0, FREE, lambda token: True)
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not numbers"):
        sample_groups(model, [[3]], [[0]], FREE, rows=4)


def test_the_empirical_distribution_is_the_models():
    model = build("qwen3", initializer_range=0.2)
    with torch.no_grad():
        probabilities = model(input_ids=torch.tensor([[3, 4]])).logits[0, -1].double().softmax(-1)
    sampling = Sampling(1, 1.0, 1.0, 0, ())
    (group,) = sample_groups(model, [[3, 4]], [[sequence_seed(0, i) for i in range(6000)]], sampling, rows=6000)
    counts = torch.bincount(torch.tensor([completion.ids[0] for completion in group]), minlength=60)
    assert chisquare(counts.numpy(), (6000 * probabilities / probabilities.sum()).numpy()).pvalue > 0.01


def test_seeds_are_stable_and_apart():
    assert sequence_seed(0, 1, 2) == 4727102316523150270
    seeds = [sequence_seed(a, b, c) for a in range(10) for b in range(10) for c in range(10)]
    assert len({seed % 2**32 for seed in seeds}) == 1000
    assert sequence_seed(1, 23) != sequence_seed(12, 3) != sequence_seed(1, 2, 3)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_which_models_are_supported(model):
    assert supports_sampler(model)
    assert supports_sampler(with_lora(model))
    assert not supports_sampler(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)))
    assert not supports_sampler(Qwen3ForSequenceClassification(Qwen3Config(**SIZES)))


@pytest.fixture(scope="module")
def policy(tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base).eval()


@pytest.mark.parametrize("draw", [sample, _generate])
def test_the_same_seed_gives_the_same_completions_and_leaves_the_random_state(policy, tokenizer, draw):
    sampling = Sampling(12, 1.0, 1.0, 0, tuple(end_ids(policy, tokenizer)))
    torch.manual_seed(3)
    expected_next = torch.rand(1).item()
    torch.manual_seed(3)
    first = draw(policy, PROMPTS, sampling, batch_size=3, seed=1)
    assert torch.rand(1).item() == expected_next
    assert draw(policy, PROMPTS, sampling, batch_size=3, seed=1) == first
    assert draw(policy, PROMPTS, sampling, batch_size=3, seed=2) != first
    assert first[0] != first[4]  # of the same prompt


@pytest.mark.parametrize("draw", [sample, _generate])
def test_a_completion_ends_with_its_end_id_or_at_the_limit(policy, tokenizer, draw):
    ends = tuple(end_ids(policy, tokenizer))
    for completion in draw(policy, PROMPTS * 8, Sampling(6, 1.0, 1.0, 0, ends), batch_size=32, seed=0):
        if completion.ended:
            assert completion.ids[-1] in ends
            assert not set(completion.ids[:-1]) & set(ends)
        else:
            assert len(completion.ids) == 6
            assert not set(completion.ids) & set(ends)


def test_models_that_are_not_supported_are_sampled_with_generate():
    other = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)).eval()
    completions = sample(other, PROMPTS, Sampling(3, 1.0, 1.0, 0, ()), batch_size=4, seed=0)
    assert [len(completion.ids) for completion in completions] == [3] * 6
    assert all(completion.log_probs == () for completion in completions)


def test_what_follows_the_end_is_cut_off():
    assert _cut_at_end([4, 2, 9, 9], end_ids=(2, 3)).ids == (4, 2)
    assert not _cut_at_end([4, 5, 6], end_ids=(2, 3)).ended
