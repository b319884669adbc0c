"""The command line, driven through its entry point with a small engine in place of the real one."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from speckv import cli
from speckv._cli_options import ModelOptions, resolve_policy
from speckv._cli_run import follow
from speckv.decoding.stats import Stats
from speckv.errors import ModelError, NumericsError, PolicyError, SpeckvError
from speckv.results import Chunk, Result
from speckv.sampling import SamplingParams

WORDS = ("The", " sky", " is", " blue", ".")


def _stats(steps: list[tuple[int, int]], tokens: int, seconds: float) -> Stats:
    return Stats(
        prompt_tokens=3,
        new_tokens=tokens,
        steps=steps,
        seconds={
            "prefill": 0.1,
            "draft": 0.2,
            "verify": 0.3,
            "decision": 0.01,
            "total": seconds,
        },
        token_times=[seconds * (i + 1) / tokens for i in range(tokens)],
    )


class FakeEngine:
    """Says ``WORDS``, at a speed that depends on the policy, and remembers every call."""

    def __init__(self) -> None:
        self.options: ModelOptions | None = None
        self.streamed: list[tuple[Any, SamplingParams, bool]] = []
        self.generated: list[str | None] = []
        self.seconds: dict[str | None, list[float]] = {}
        self.tokens: dict[str | None, list[int]] = {}
        self.interrupt_after: int | None = None
        self.interrupt_generate_after: int | None = None
        self.failure: Exception | None = None

    def describe(self) -> str:
        return "target fake (fp32, float32), draft none"

    def result(
        self, policy: str | None, finish: str = "stop", words: tuple[str, ...] = WORDS
    ) -> Result:
        queue = self.seconds.get(policy, [])
        stats = _stats([(4, 3), (2, 0)], len(words), queue.pop(0) if queue else 1.0)
        ids = self.tokens.get(policy, list(range(len(words))))
        return Result("".join(words), ids, finish, stats, [7, 8, 9], None)

    def generate(
        self, prompt: Any, params: SamplingParams, *, chat: bool = False, policy: str | None = None
    ) -> Result:
        if self.interrupt_generate_after == len(self.generated):
            raise KeyboardInterrupt
        self.generated.append(policy)
        return self.result(policy)

    def stream(
        self, prompt: Any, params: SamplingParams, *, chat: bool = False, policy: str | None = None
    ) -> Iterator[Chunk]:
        self.streamed.append((prompt, params, chat))
        if self.failure is not None:
            raise self.failure
        return self._chunks()

    def _chunks(self) -> Iterator[Chunk]:
        print("a library's own chatter")
        said = 0
        try:
            for i, word in enumerate(WORDS[:-1]):
                if i == self.interrupt_after:
                    raise KeyboardInterrupt
                said += 1
                yield Chunk(word, [i])
        except KeyboardInterrupt:
            partial = self.result(None, "interrupted", WORDS[:said])
            yield Chunk("", [], "interrupted", partial)
            return
        yield Chunk(WORDS[-1], [len(WORDS) - 1], "stop", self.result(None))


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine()

    def load(options: ModelOptions) -> FakeEngine:
        fake.options = options
        return fake

    monkeypatch.setattr(cli, "load_engine", load)
    return fake


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(options: ModelOptions) -> None:
        raise AssertionError("an engine was loaded for arguments that are wrong")

    monkeypatch.setattr(cli, "load_engine", load)


Capture = pytest.CaptureFixture[str]


def test_text_goes_to_stdout_and_everything_else_to_stderr(
    engine: FakeEngine, capsys: Capture
) -> None:
    assert cli.run(["generate", "Why?"]) == 0
    out, err = capsys.readouterr()
    assert out == "a library's own chatter\nThe sky is blue.\n"
    assert "target fake" in err
    assert "60.0" not in out and "50.0%" in err  # 3 of 6 drafted tokens
    assert "γ  2 │" in err and "γ  4 │" in err
    assert "prefill 0.10, draft 0.20, verify 0.30, decision 0.01" in err


def test_json_is_one_object_and_nothing_else(engine: FakeEngine, capsys: Capture) -> None:
    assert cli.run(["generate", "Why?", "--json"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert out.count("\n") == 1
    assert err == "target fake (fp32, float32), draft none\na library's own chatter\n"
    assert set(document) == {"text", "token_ids", "finish_reason", "stats"}
    assert document["text"] == "The sky is blue."
    assert document["token_ids"] == [0, 1, 2, 3, 4]
    assert document["finish_reason"] == "stop"
    stats = document["stats"]
    assert stats["steps"] == 2
    assert stats["gamma_histogram"] == {"2": 1, "4": 1}
    assert stats["acceptance_rate"] == 0.5
    assert stats["tokens_per_step"] == 2.0
    assert stats["tokens_per_second"] == 5.0
    assert {"draft", "verify", "decision", "total"} <= set(stats["seconds"])


def test_options_reach_the_engine(engine: FakeEngine, capsys: Capture) -> None:
    options = (
        "--max-new-tokens 9 --temperature 0.5 --top-k 3 --top-p 0.9 --seed 11 --ignore-eos "
        "--coupling rejection --policy entropy:1.5 --compression int8 --dtype bf16 --target t "
        "--draft first:2 --device cpu --loop eager --chat"
    )
    assert cli.run(["generate", "Why?", *options.split()]) == 0
    expected_options = ("t", "first:2", "int8", "bf16", "entropy:1.5", "cpu", "eager")
    assert engine.options == ModelOptions(*expected_options)
    expected = SamplingParams(9, 0.5, 3, 0.9, 11, "rejection", ignore_eos=True)
    assert engine.streamed == [("Why?", expected, True)]


def test_defaults_are_left_to_the_engine(engine: FakeEngine, capsys: Capture) -> None:
    assert cli.run(["generate", "Why?"]) == 0
    assert engine.options == ModelOptions(None, None, None, None, "speckv", None)


def test_a_drawn_seed_is_shown_when_sampling(engine: FakeEngine, capsys: Capture) -> None:
    assert cli.run(["generate", "Why?", "--temperature", "1"]) == 0
    seed = engine.streamed[0][1].seed
    assert isinstance(seed, int)
    assert f"seed {seed}" in capsys.readouterr().err
    assert cli.run(["generate", "Why?"]) == 0
    assert "seed" not in capsys.readouterr().err


def test_system_message(engine: FakeEngine, capsys: Capture) -> None:
    assert cli.run(["generate", "Why?", "--chat", "--system", "Be brief."]) == 0
    messages, _, chat = engine.streamed[0]
    assert chat
    assert messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
    ]


def test_prompt_from_stdin(
    engine: FakeEngine, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    assert cli.run(["generate", "-"]) == 0
    assert engine.streamed[0][0] == "two\nlines"


@pytest.mark.parametrize("json_mode", [False, True])
@pytest.mark.parametrize("compare", [False, True])
def test_ctrl_c_keeps_the_partial_text(
    engine: FakeEngine, capsys: Capture, json_mode: bool, compare: bool
) -> None:
    engine.interrupt_after = 2
    options = ["--json"] * json_mode + ["--compare"] * compare
    assert cli.run(["generate", "Why?", *options]) == 130
    out, err = capsys.readouterr()
    assert not engine.generated
    if json_mode:
        document = json.loads(out)
        assert document["finish_reason"] == "interrupted"
        assert document["text"] == "The sky"
        assert "compare" not in document
    else:
        assert out.endswith("The sky\n")
        assert "tokens/s" in err


def test_ctrl_c_while_a_chunk_is_shown(engine: FakeEngine) -> None:
    shown: list[str] = []

    def show(chunk: Chunk) -> None:
        shown.append(chunk.text)
        if len(shown) == 3:
            raise KeyboardInterrupt

    result = follow(engine.stream("Why?", SamplingParams()), show)
    assert result.finish_reason == "interrupted"
    assert result.text == "The sky is"
    assert shown == ["The", " sky", " is", ""]


def test_ctrl_c_while_the_last_chunk_is_shown_loses_nothing(engine: FakeEngine) -> None:
    def show(chunk: Chunk) -> None:
        if chunk.result is not None:
            raise KeyboardInterrupt

    assert follow(engine.stream("Why?", SamplingParams()), show).finish_reason == "stop"


def test_a_stream_without_a_result_is_an_error() -> None:
    with pytest.raises(SpeckvError, match="ended without a result"):
        follow(iter([Chunk("The", [0])]), lambda chunk: None)


def test_ctrl_c_while_loading(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def load(options: ModelOptions) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_engine", load)
    assert cli.run(["generate", "Why?"]) == 130
    assert capsys.readouterr().out == ""


def test_compare_is_interleaved_and_takes_medians(engine: FakeEngine, capsys: Capture) -> None:
    # The first of each is the warm-up. Five tokens each: 10, 5 and 20 tokens/s in the first round.
    engine.seconds = {
        "entropy:1": [9.0, 0.5, 0.5, 0.25],
        "fixed:0": [9.0, 1.0, 0.5, 1.0],
        "fixed:4": [9.0, 0.25, 0.5, 0.5],
    }
    assert cli.run(["generate", "Why?", "--json", "--compare", "--policy", "entropy:1"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["compare"] == {
        "this": 10.0,
        "plain": 5.0,
        "fixed4": 10.0,
        "ratio_to_plain": 2.0,  # 2, 1, 4
        "ratio_to_fixed4": 1.0,  # 0.5, 1, 2
        "runs": 3,
        "identical": True,
    }
    assert engine.generated == [
        *("entropy:1", "fixed:0", "fixed:4"),
        *("fixed:0", "fixed:4", "entropy:1"),
        *("fixed:4", "entropy:1", "fixed:0"),
        *("entropy:1", "fixed:0", "fixed:4"),
    ]
    assert "2.00x" in err and "identical" in err


def test_compare_runs_option(engine: FakeEngine, capsys: Capture) -> None:
    assert cli.run(["generate", "Why?", "--compare", "--runs", "1", "--gamma", "2"]) == 0
    assert sorted(map(str, engine.generated)) == 2 * ["fixed:0"] + 2 * ["fixed:2"] + 2 * ["fixed:4"]
    assert "median of 1 round" in capsys.readouterr().err


@pytest.mark.parametrize("differing", ["speckv", "fixed:0", "fixed:4"])
def test_differing_tokens_are_an_error(engine: FakeEngine, capsys: Capture, differing: str) -> None:
    engine.tokens[differing] = [0, 1, 2, 3, 99]
    assert cli.run(["generate", "Why?", "--json", "--compare", "--runs", "1"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["compare"]["identical"] is False
    assert "error: the tokens differ" in err


def test_rejection_sampling_does_not_promise_identical_tokens(
    engine: FakeEngine, capsys: Capture
) -> None:
    engine.tokens["fixed:0"] = [9]
    options = "--json --compare --runs 1 --temperature 1 --coupling rejection"
    assert cli.run(["generate", "Why?", *options.split()]) == 0
    assert json.loads(capsys.readouterr().out)["compare"]["identical"] is None


def test_ctrl_c_in_a_comparison_keeps_the_generation(engine: FakeEngine, capsys: Capture) -> None:
    engine.interrupt_generate_after = 4
    assert cli.run(["generate", "Why?", "--json", "--compare"]) == 130
    document = json.loads(capsys.readouterr().out)
    assert document["text"] == "The sky is blue." and "compare" not in document


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "PROMPT: expected a text, or - to read it from stdin; got nothing"),
        ([""], "PROMPT: expected some text, got an empty prompt"),
        (["  \n"], "PROMPT: expected some text, got an empty prompt"),
        (["a", "--max-new-tokens", "0"], "max_new_tokens: expected 1 to"),
        (["a", "--max-new-tokens", "many"], "Invalid value for '--max-new-tokens'"),
        (["a", "--temperature", "-0.1"], "temperature: expected 0 to 100, got -0.1"),
        (["a", "--temperature", "nan"], "temperature: expected 0 to 100, got nan"),
        (["a", "--temperature", "inf"], "temperature: expected 0 to 100, got inf"),
        (["a", "--top-k", "-1"], "top_k: expected 0 to"),
        (["a", "--top-p", "0"], "top_p: expected a value in (0, 1], got 0.0"),
        (["a", "--top-p", "1.5"], "top_p: expected a value in (0, 1], got 1.5"),
        (["a", "--seed", str(2**64)], "seed: expected"),
        (["a", "--coupling", "maximal"], "coupling: expected one of"),
        (["a", "--gamma", "16"], "--gamma: expected an integer in 0..15, got 16"),
        (["a", "--gamma", "-1"], "--gamma: expected an integer in 0..15, got -1"),
        (
            ["a", "--gamma", "2", "--policy", "paper"],
            "--gamma: expected --gamma or --policy, not both; got --gamma 2 and --policy paper",
        ),
        (["a", "--policy", ""], "--policy: expected a name, got an empty string"),
        (
            ["a", "--compression", "int3"],
            "--compression: expected one of fp32, fp16, bf16, int8, nf4; got 'int3'",
        ),
        (["a", "--dtype", "fp8"], "--dtype: expected one of fp32, fp16, bf16; got 'fp8'"),
        (
            ["a", "--compression", "fp16", "--dtype", "bf16"],
            "--dtype: expected fp16 with --compression fp16, got bf16",
        ),
        (["a", "--device", "tpu"], "--device: expected cpu, cuda or cuda:N, got 'tpu'"),
        (
            ["a", "--loop", "fast"],
            "--loop: expected one of auto, device, graphed, eager; got 'fast'",
        ),
        (["a", "--device", "cuda:x"], "--device: expected cpu, cuda or cuda:N, got 'cuda:x'"),
        (["a", "--system", "s"], "--system: expected together with --chat, got it alone"),
        (["a", "--runs", "0"], "--runs: expected at least 1, got 0"),
        (["a", "--no-such-option"], "No such option: --no-such-option"),
    ],
)
def test_bad_arguments_are_one_line_and_code_2(
    no_engine: None, capsys: Capture, arguments: list[str], message: str
) -> None:
    assert cli.run(["generate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err


def test_unknown_command(no_engine: None, capsys: Capture) -> None:
    assert cli.run(["generat"]) == 2
    assert "No such command 'generat'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("prompt: expected at most 9 tokens, got 10"), 2),
        (TypeError("prompt: expected text, got int"), 2),
        (PolicyError("policy: expected fixed:K, got 'fast'"), 2),
        (ModelError("cannot fetch a/b:\n  no network"), 1),
        (NumericsError("the target's logits are NaN"), 1),
        (FileNotFoundError(2, "No such file or directory", "draft.safetensors"), 1),
    ],
)
def test_the_engines_errors_are_one_line(
    engine: FakeEngine, capsys: Capture, error: Exception, code: int
) -> None:
    engine.failure = error
    assert cli.run(["generate", "Why?", "--json"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == f"error: {' '.join(str(error).split())}"


def test_defects_keep_their_traceback(engine: FakeEngine) -> None:
    engine.failure = ZeroDivisionError("a defect")
    with pytest.raises(ZeroDivisionError):
        cli.run(["generate", "Why?"])


def test_tracebacks_on_request(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECKV_TRACEBACK", "1")
    engine.failure = ModelError("cannot fetch")
    with pytest.raises(ModelError):
        cli.run(["generate", "Why?"])


def test_gamma_is_short_for_fixed() -> None:
    assert resolve_policy(None, None) == "speckv"
    assert resolve_policy("confidence:0.4", None) == "confidence:0.4"
    assert [resolve_policy(None, gamma) for gamma in (0, 15)] == ["fixed:0", "fixed:15"]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run ``speckv chat`` on lines of input; an exception among them is raised at the prompt."""

    def run(*lines: str | BaseException, options: tuple[str, ...] = ()) -> int:
        pending = list(lines)

        def ask(prompt: str) -> str:
            if not pending:
                raise EOFError
            line = pending.pop(0)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", ask)
        return cli.run(["chat", *options])

    return run


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_chat_remembers_and_resets(
    engine: FakeEngine, say: Callable[..., int], capsys: Capture
) -> None:
    system = {"role": "system", "content": "Be brief."}
    options = ("--system", "Be brief.")
    assert say("one", "", "two", "/reset", "three", "/exit", "four", options=options) == 0
    asked = [prompt for prompt, _, chat in engine.streamed if chat]
    answer = _assistant("The sky is blue.")
    assert asked == [
        [system, _user("one")],
        [system, _user("one"), answer, _user("two")],
        [system, _user("three")],
    ]
    assert capsys.readouterr().out.count("The sky is blue.\n") == 3


def test_chat_stats_and_unknown_commands(
    engine: FakeEngine, say: Callable[..., int], capsys: Capture
) -> None:
    assert say("/stats", "hello", "/stats", "/sats") == 0
    err = capsys.readouterr().err
    assert "no answer yet" in err
    assert err.count("acceptance") == 1
    assert "unknown command /sats" in err
    assert len(engine.streamed) == 1


def test_chat_ctrl_c_stops_only_the_answer(
    engine: FakeEngine, say: Callable[..., int], capsys: Capture
) -> None:
    engine.interrupt_after = 1
    assert say("one", KeyboardInterrupt(), "two") == 0
    assert engine.streamed[1][0] == [_user("one"), _assistant("The"), _user("two")]
    err = capsys.readouterr().err
    assert "[interrupted]" in err
    assert "/exit or Ctrl-D leaves" in err


def test_chat_goes_on_after_an_error(
    engine: FakeEngine, say: Callable[..., int], capsys: Capture
) -> None:
    engine.failure = ValueError("prompt: expected at most 9 tokens, got 10")
    assert say("too long", "/stats") == 0
    err = capsys.readouterr().err
    assert "error: prompt: expected at most 9 tokens, got 10" in err
    assert "no answer yet" in err
