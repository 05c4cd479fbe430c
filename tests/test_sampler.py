"""What every sampler must keep to: groups, stopping, seeds, and the distribution that it samples from."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from align.build import locate_model
from rollout.client import Server
from rollout.local import LocalSampler
from rollout.publish import Follower
from rollout.sampler import SamplingParams
from rollout.types import FinishReason, Prompt
from rollout.vllm import Limits, VllmSampler


@pytest.fixture(scope="module")
def policy():
    folder = locate_model("builtin:arithmetic")
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(params=["transformers", "vllm"])
def sampler(request, policy):
    if request.param == "transformers":
        return make_sampler(policy)
    return vllm_sampler(request.getfixturevalue("vllm_workers"), policy[1])


def make_sampler(policy, batch_size: int = 256) -> LocalSampler:
    model, tokenizer = policy

    @contextmanager
    def lend():
        yield model

    return LocalSampler(lend, tokenizer, [tokenizer.eos_token_id], batch_size)


def vllm_sampler(workers, tokenizer, concurrent: int = 64) -> VllmSampler:
    servers = [Server(url, workers.key, 60.0) for url in workers.urls]
    for server in servers:
        server.carry("test-0")
    decode = partial(tokenizer.batch_decode, skip_special_tokens=True)
    return VllmSampler(servers, Follower(), decode, [tokenizer.eos_token_id], Limits(concurrent, 30.0), "test")


def prompts_of(policy, *texts: str) -> list[Prompt]:
    tokenizer = policy[1]
    return [Prompt(str(i), text, tuple(tokenizer(text)["input_ids"]), {}) for i, text in enumerate(texts)]


def params(**changes) -> SamplingParams:
    return SamplingParams(**({"samples_per_prompt": 3, "max_tokens": 24, "seed": 1} | changes))


def test_groups_follow_the_prompts_and_completions_end_once(policy, sampler):
    sampler.sync(iter(()), version=7)
    for server in getattr(sampler, "servers", ()):
        server.carry("test-7")
    groups = sampler.sample(prompts_of(policy, "7+5-3=?", "1+1+1+1=?"), params())
    assert [group.prompt.text for group in groups] == ["7+5-3=?", "1+1+1+1=?"]
    stop, tokenizer = policy[1].eos_token_id, policy[1]
    for group in groups:
        assert len(group.samples) == 3
        for sample in group.samples:
            assert sample.policy_version == 7
            assert 1 <= len(sample.token_ids) <= 24
            assert stop not in sample.token_ids[:-1]
            assert (sample.finish_reason is FinishReason.STOP) == (sample.token_ids[-1] == stop)
            assert sample.text == tokenizer.decode(sample.token_ids, skip_special_tokens=True)


def test_the_limit_is_a_limit(policy, sampler):
    samples = sampler.sample(prompts_of(policy, "7+5-3=?"), params(max_tokens=1))[0].samples
    assert all(len(s.token_ids) == 1 and s.finish_reason is FinishReason.LENGTH for s in samples)


def test_the_seed_decides_and_global_numbers_do_not(policy, sampler):
    prompts = prompts_of(policy, "7+5-3=?", "9-4+4=?")
    torch.manual_seed(0)
    first = sampler.sample(prompts, params())
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    assert sampler.sample(prompts, params()) == first
    assert (torch.random.get_rng_state() == before).all()
    assert sampler.sample(prompts, params(seed=2)) != first


def test_greedy_is_greedy_and_batches_do_not_matter_to_it(policy):
    prompts = prompts_of(policy, "7+5-3=?", "9-4+4-1=?", "1+2+3=?")
    whole = make_sampler(policy).sample(prompts, params(temperature=0, samples_per_prompt=1))
    one_by_one = make_sampler(policy, batch_size=1).sample(prompts, params(temperature=0, samples_per_prompt=1))
    assert [g.samples[0].token_ids for g in whole] == [g.samples[0].token_ids for g in one_by_one]  # padding is no matter
    model, _ = policy
    ids = list(prompts[1].token_ids)
    for token in whole[1].samples[0].token_ids:
        assert int(model(torch.tensor([ids])).logits[0, -1].argmax()) == token
        ids.append(token)


def test_samples_come_from_the_models_distribution(policy, sampler):
    """First tokens of 4,000 samples against softmax(logits): total variation within what chance allows."""
    model, _ = policy
    prompt = prompts_of(policy, "7+5-3=?")[0]
    expected = model(torch.tensor([prompt.token_ids])).logits[0, -1].softmax(-1)
    group = sampler.sample([prompt], params(samples_per_prompt=4000, max_tokens=1))[0]
    counts = torch.bincount(torch.tensor([s.token_ids[0] for s in group.samples]), minlength=len(expected))
    distance = 0.5 * (counts / 4000 - expected).abs().sum()
    assert distance < 0.5 * ((2 / torch.pi * expected * (1 - expected) / 4000).sqrt().sum()) * 2


def test_dropout_is_off_while_sampling(policy):
    model, sampler = policy[0], make_sampler(policy)
    seen = []
    hook = model.register_forward_pre_hook(lambda module, inputs: seen.append(module.training))
    model.train()
    try:
        sampler.sample(prompts_of(policy, "7+5-3=?"), params())
        assert model.training
    finally:
        hook.remove()
        model.eval()
    assert seen
    assert not any(seen)


def test_settings_that_came_with_the_model_do_not_leak_in(policy):
    model, sampler = policy[0], make_sampler(policy)
    prompts = prompts_of(policy, "7+5-3=?")
    plain = sampler.sample(prompts, params(samples_per_prompt=8))
    mine = model.generation_config
    model.generation_config = GenerationConfig(top_k=1, repetition_penalty=5.0, suppress_tokens=list(range(256)))
    try:
        assert sampler.sample(prompts, params(samples_per_prompt=8)) == plain
        assert model.generation_config.top_k == 1
    finally:
        model.generation_config = mine


def test_top_k_and_top_p_narrow(policy, sampler):
    prompts = prompts_of(policy, "7+5-3=?")
    greedy = sampler.sample(prompts, params(temperature=0, samples_per_prompt=1))[0].samples[0].token_ids
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert {s.token_ids for s in sampler.sample(prompts, params(**narrow))[0].samples} == {greedy}


SETTINGS = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"top_p": 0.8},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1.5, "top_p": 0.7, "min_p": 0.2},  # the order of the two matters
    {"repetition_penalty": 1.3},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_log_probs_are_those_of_the_distribution_that_was_sampled_from(policy, sampler, settings):
    """Against the model's own logits, divided and cut off by hand, token by token."""
    model, _ = policy
    prompts = prompts_of(policy, "7+5-3=?", "1+1+1+1=?")
    for group in sampler.sample(prompts, params(log_probs=True, **settings)):
        for sample in group.samples:
            assert len(sample.log_probs) == len(sample.token_ids)
            ids = list(group.prompt.token_ids)
            logits = model(torch.tensor([ids + list(sample.token_ids)])).logits[0, len(ids) - 1 : -1].double()
            for row, token, log_prob in zip(logits, sample.token_ids, sample.log_probs, strict=True):
                assert log_prob == pytest.approx(by_hand(row, ids, **settings)[token].item(), abs=2e-4)
                ids.append(token)


def by_hand(logits, seen, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """Log-probabilities of the next token: penalty, temperature, the floor, the k likeliest, the nucleus."""
    logits = logits.clone()
    for token in set(seen):
        logits[token] *= repetition_penalty if logits[token] < 0 else 1 / repetition_penalty
    kept = (logits / temperature).softmax(-1)
    kept[kept < min_p * kept.max()] = 0.0
    order = kept.argsort(descending=True)
    kept[order[top_k or len(order) :]] = 0.0
    kept /= kept.sum()
    before = kept[order].cumsum(0) - kept[order]  # mass of the likelier ones
    kept[order[before >= top_p]] = 0.0
    return (kept / kept.sum()).log()


def test_asking_for_log_probs_changes_no_sample(policy):
    prompts = prompts_of(policy, "7+5-3=?", "1+1+1+1=?")
    for settings in SETTINGS:
        plain, asked = (make_sampler(policy).sample(prompts, params(log_probs=a, **settings)) for a in (False, True))
        assert [s.token_ids for g in plain for s in g.samples] == [s.token_ids for g in asked for s in g.samples]


def test_with_vllm_places_decide_on_samples_not_processes_nor_requests(policy, vllm_workers, monkeypatch):
    """Four prompts by one process, or by two in blocks, or dealt out one by one, or in fewer requests: the same samples."""
    sampler = vllm_sampler(vllm_workers, policy[1])
    prompts = prompts_of(policy, "7+5-3=?", "9-4+4=?", "1+2+3=?", "8-7=?")
    whole = sampler.sample(prompts, params())
    blocks = sampler.sample(prompts[:2], params()) + sampler.sample(prompts[2:], params(first=2))
    even, odd = sampler.sample(prompts[::2], params(stride=2)), sampler.sample(prompts[1::2], params(first=1, stride=2))
    assert blocks == whole
    assert [even[0], odd[0], even[1], odd[1]] == whole
    assert len({tuple(s.token_ids for s in g.samples) for g in sampler.sample([prompts[0]] * 4, params())}) > 1
    monkeypatch.setattr("rollout.vllm.REQUESTS", 1)
    together = vllm_sampler(vllm_workers, policy[1], concurrent=2)  # less than the three samples of a request
    assert [request["n"] for request in together._requests(prompts, params())] == [3, 3, 3, 3]
    assert together.sample(prompts, params()) == whole


def test_with_vllm_greedy_samples_are_made_once(policy, vllm_workers):
    sampler, greedy = vllm_sampler(vllm_workers, policy[1]), params(temperature=0.0)
    prompts = prompts_of(policy, "7+5-3=?", "8-7=?")
    assert len(sampler._requests(prompts, greedy)) == 2
    for group in sampler.sample(prompts, greedy):
        assert group.samples == (group.samples[0],) * 3
