"""Generate: the order of its events, and what they carry."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from fakes import EOS, FakeFiles, FakeModel
from mlxpool.v1 import model_service_pb2 as pb
from rpc.harness import (
    Server,
    chat_prompt,
    final_text,
    kinds_of,
    release,
    running_server,
    text_of,
    text_request,
    until,
)


def endless(prompt: Sequence[int]) -> Iterator[int]:
    while True:
        yield ord("x")


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        (pb.Prompt(text="plain"), "plain"),
        (chat_prompt((pb.ROLE_SYSTEM, "a"), (pb.ROLE_USER, "b")), "<system>a<user>b"),
        (pb.Prompt(tokens=pb.TokenIds(ids=[104, 105])), "hi"),
    ],
    ids=["text", "chat", "tokens"],
)
async def test_order_of_events(server: Server, prompt: pb.Prompt, answer: str) -> None:
    """started, then progress and deltas, then one finished that folds the deltas."""
    events = await server.generate(text_request(prompt=prompt))
    kinds = kinds_of(events)
    assert (kinds[0], kinds[-1]) == ("started", "finished")
    assert set(kinds[1:-1]) <= {"progress", "delta"}
    assert text_of(events) == answer == final_text(events)
    finished = events[-1].finished
    assert finished.message.role == pb.ROLE_ASSISTANT
    assert finished.finish_reason == pb.FINISH_REASON_STOP
    assert finished.stop_token_id == EOS
    assert finished.usage.prompt_tokens == len(answer)
    assert finished.usage.completion_tokens == len(answer) + 1


async def test_started_names_what_runs(server: Server) -> None:
    """The caller's id and seed come back; without a seed the server reports the one it chose."""
    request = text_request(generation_id="mine", sampling=pb.SamplingParams(seed=-7))
    started = (await server.generate(request))[0].started
    assert (started.generation_id, started.model, started.seed) == ("mine", "m", -7)
    chosen = (await server.generate(text_request()))[0].started
    assert chosen.generation_id
    assert 0 < chosen.seed < 2**53


async def test_progress_names_each_phase() -> None:
    """Loading, prefilling and decoding are told in this order, with their figures."""
    files = {"m": FakeFiles(model=FakeModel(is_stepped=True))}
    files["m"].may_load.clear()
    async with running_server(files, progress_interval_s=0.05) as server:
        reader = server.reader(text_request("hello"))

        async def progress_in(phase: int) -> pb.GenerationProgress:
            while (progress := (await reader.next()).progress).phase != phase:
                pass
            return progress

        loading = await progress_in(pb.GENERATION_PHASE_LOADING)
        while not loading.load.completed_bytes:
            loading = await progress_in(pb.GENERATION_PHASE_LOADING)
        load = loading.load
        assert load.phase == pb.LOAD_PHASE_LOADING
        assert (load.completed_bytes, load.total_bytes) == (50, 100)
        files["m"].may_load.set()
        # The step after the one that prefills waits, so that this phase is not overtaken.
        release(server.model, 1)
        prefilling = await progress_in(pb.GENERATION_PHASE_PREFILLING)
        assert prefilling.prompt_tokens == 5
        release(server.model, 100)
        await progress_in(pb.GENERATION_PHASE_DECODING)
        assert (await reader.rest())[-1].HasField("finished")


async def test_finished_has_timings(server: Server) -> None:
    """Every phase is timed, and the first token comes before the end."""
    timings = (await server.generate(text_request()))[-1].finished.timings
    total_ns = timings.total.ToNanoseconds()
    assert 0 < timings.time_to_first_token.ToNanoseconds() <= total_ns
    assert 0 < timings.load.ToNanoseconds() < total_ns


async def test_final_only_sends_no_delta(server: Server) -> None:
    """The whole text, and the ids if asked for, come with finished."""
    options = pb.OutputOptions(final_only=True, include_token_ids=True)
    events = await server.generate(text_request("abc", output=options))
    assert "delta" not in kinds_of(events)
    assert final_text(events) == "abc"
    assert list(events[-1].finished.token_ids) == [97, 98, 99, EOS]


async def test_token_ids_come_with_deltas(server: Server) -> None:
    """Deltas carry every id, the ending one too, and finished does not repeat them."""
    request = text_request("abc", output=pb.OutputOptions(include_token_ids=True))
    events = await server.generate(request)
    ids = [each for event in events for each in event.delta.token_ids]
    assert ids == [97, 98, 99, EOS]
    assert not events[-1].finished.token_ids


async def test_max_tokens(server: Server) -> None:
    """It ends after exactly as many tokens."""
    events = await server.generate(text_request("abcdef", stop=pb.StopConditions(max_tokens=3)))
    assert text_of(events) == "abc"
    assert events[-1].finished.finish_reason == pb.FINISH_REASON_MAX_TOKENS
    assert not events[-1].finished.HasField("stop_token_id")


async def test_stop_sequence_is_cut(server: Server) -> None:
    """A match across tokens is cut from deltas and message, and named."""
    stop = pb.StopConditions(sequences=["never", "cde"])
    events = await server.generate(text_request("abcdefg", stop=stop))
    assert text_of(events) == "ab" == final_text(events)
    assert events[-1].finished.finish_reason == pb.FINISH_REASON_STOP_SEQUENCE
    assert events[-1].finished.stop_sequence == "cde"


async def test_stop_token_and_ignored_eos(server: Server) -> None:
    """A stop token ends like a stop sequence, and names itself; ignore_eos runs past the end."""
    stop = pb.StopConditions(token_ids=[ord("c")])
    events = await server.generate(text_request("abcd", stop=stop))
    assert text_of(events) == "ab"
    assert events[-1].finished.stop_token_id == ord("c")
    stop = pb.StopConditions(ignore_eos=True, max_tokens=6)
    events = await server.generate(text_request("abcd", stop=stop))
    assert events[-1].finished.usage.completion_tokens == 6


async def test_deltas_hold_whole_characters(server: Server) -> None:
    """An emoji of four tokens arrives in one delta; no delta holds a part of one."""
    text = "a👋🏽世 é"
    events = await server.generate(text_request(text))
    deltas = [event.delta.text for event in events if event.HasField("delta")]
    assert "".join(deltas) == text
    assert "\ufffd" not in "".join(deltas)


async def test_cut_character_becomes_a_replacement(server: Server) -> None:
    """A character that max_tokens cuts is shown as U+FFFD, not dropped."""
    events = await server.generate(text_request("a世", stop=pb.StopConditions(max_tokens=2)))
    assert text_of(events) == "a\ufffd" == final_text(events)


async def test_max_duration_keeps_the_partial_result() -> None:
    """The soft limit ends with what there is and status OK, while the deadline would lose it."""
    files = {"m": FakeFiles(model=FakeModel(script=endless), context_length=2**30)}
    async with running_server(files) as server:
        stop = pb.StopConditions()
        stop.max_duration.FromMilliseconds(50)
        options = pb.OutputOptions(final_only=True)
        events = await server.generate(text_request(stop=stop, output=options))
        assert events[-1].finished.finish_reason == pb.FINISH_REASON_TIME_LIMIT
        assert final_text(events)


async def test_context_length_ends_it() -> None:
    """Without max_tokens the model's context does."""
    files = {"m": FakeFiles(context_length=10, model=FakeModel(script=endless))}
    async with running_server(files) as server:
        events = await server.generate(text_request("1234"))
        assert events[-1].finished.finish_reason == pb.FINISH_REASON_CONTEXT_LENGTH
        assert events[-1].finished.usage.completion_tokens == 6


async def test_sampling_reaches_the_engine() -> None:
    """Every sampling field is what the backend gets."""
    model = FakeModel(is_stepped=True)
    async with running_server({"m": FakeFiles(model=model)}) as server:
        sampling = pb.SamplingParams(
            temperature=0.5, top_p=0.25, top_k=7, min_p=0.125, repetition_penalty=1.5,
            presence_penalty=-1, frequency_penalty=2, penalty_context_size=9,
            xtc_probability=0.5, xtc_threshold=0.25, logit_bias={3: -100.0}, seed=11,
        )  # fmt: skip
        call = server.models.Generate(text_request(sampling=sampling))
        await until(lambda: bool(model.batches and model.batches[0].samplings))
        (got,) = model.batches[0].samplings.values()
        for field, value in sampling.ListFields():
            assert getattr(got, field.name) == value
        release(model, 100)
        assert [event async for event in call]


async def test_alias_names_the_same_model() -> None:
    """`started` has the resolved name."""
    from pathlib import Path  # noqa: PLC0415 - only here

    from mlxpool_server.domain import ModelSpec  # noqa: PLC0415 - only here

    specs = (ModelSpec("m", Path("unread"), aliases=("default",)),)
    async with running_server(specs=specs) as server:
        events = await server.generate(text_request(model="default"))
        assert events[0].started.model == "m"


async def test_require_loaded_after_a_load(server: Server) -> None:
    """It runs on a loaded model."""
    await server.assert_serves()
    events = await server.generate(text_request(require_loaded=True))
    assert events[-1].finished.finish_reason == pb.FINISH_REASON_STOP


async def test_slow_reader_gets_everything_in_fewer_deltas() -> None:
    """Tokens that come while nobody reads are joined, and none is lost."""
    text = "0123456789" * 2000
    files = {"m": FakeFiles(context_length=100_000)}
    async with running_server(files) as server:
        options = pb.OutputOptions(include_token_ids=True)
        stop = pb.StopConditions(max_tokens=50_000)
        reader = server.reader(text_request(text, output=options, stop=stop))
        events = [await reader.next()]
        # Not reading: flow control stops the server's writer, the engine goes on.
        model = server.model
        await until(lambda: bool(model.batches) and not model.batches[0].slots)
        events += await reader.rest()
        deltas = [event.delta for event in events if event.HasField("delta")]
        assert "".join(delta.text for delta in deltas) == text == final_text(events)
        assert sum(len(delta.token_ids) for delta in deltas) == len(text) + 1
        assert deltas[-1].completion_tokens == len(text) + 1
        assert len(deltas) < len(text) / 2
