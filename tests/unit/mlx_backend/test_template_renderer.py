"""Hostile chat templates: nothing is read, run or held for ever, and the next prompt renders."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mlxpool_server.domain import ChatMessage, ChatPrompt, Role
from mlxpool_server.errors import InvalidFieldError
from mlxpool_server.mlx_backend import tokenizer as tokenizer_module
from mlxpool_server.mlx_backend.process_memory import resident_bytes, resident_bytes_by_ps
from mlxpool_server.mlx_backend.template_renderer import TemplateError, TemplateRenderer
from mlxpool_server.mlx_backend.tokenizer import MlxTokenizer
from tiny_models import write_byte_level

LIMIT_S = 1.0
# A killed process, a new one, and a machine that is busy.
PATIENCE_S = 30.0
USER = [{"role": "user", "content": "hi"}]
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def renderer() -> Iterator[TemplateRenderer]:
    renderer = TemplateRenderer(LIMIT_S)
    yield renderer
    renderer.close()


def render(renderer: TemplateRenderer, template: str, **variables: object) -> str:
    return renderer.render(template, USER, variables)


def problem_of(renderer: TemplateRenderer, template: str, **variables: object) -> str:
    """It fails, soon, and the next one does not."""
    started_at = time.monotonic()
    with pytest.raises(TemplateError) as caught:
        render(renderer, template, **variables)
    assert time.monotonic() - started_at < PATIENCE_S
    assert render(renderer, PLAIN) == "[user]hi"
    return str(caught.value)


def test_a_template_is_rendered(renderer: TemplateRenderer) -> None:
    """With the variables that transformers gives it, line feeds and Unicode as they are."""
    template = "{{ bos }}" + PLAIN + "!\n{% if add_generation_prompt %}<a>{% endif %}é👋"
    text = render(renderer, template, bos="<s>", add_generation_prompt=True)
    assert text == "<s>[user]hi!\n<a>é👋"


def test_lone_surrogates_survive(renderer: TemplateRenderer) -> None:
    """What travels between the processes is the text, whatever is in it."""
    assert renderer.render(PLAIN, [{"role": "user", "content": "\ud800\0"}], {}) == "[user]\ud800\0"


def test_its_refusal_is_in_its_own_words(renderer: TemplateRenderer) -> None:
    """raise_exception is how templates talk to callers."""
    assert problem_of(renderer, "{{ raise_exception('no such role') }}") == "no such role"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}x{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__']['__mro__'][1]['__subclasses__']() }}",
        "{{ (''|attr('__class__')).__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ lipsum.__globals__['os'].system('id') }}",
        "{{ joiner.__init__.__globals__ }}x{{ joiner.__init__.__globals__.x }}",
        "{{ raise_exception.__globals__ }}x{{ raise_exception.__globals__['jinja2'] }}",
        "{{ strftime_now.__code__ }}x{{ strftime_now.__code__.co_code }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ ''.format_map.__self__.__class__ }}x{{ self.__init__.__globals__.x }}",
        "{{ namespace(__init__=1) }}",
        "{{ messages.append({}) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ messages.__class__.append(messages, 1) }}",
        "{% include '/etc/passwd' %}",
        "{% import '/etc/passwd' as p %}",
        "{% extends '/etc/passwd' %}",
        "{{ open('/etc/passwd').read() }}",
        "{{ __import__('os').environ }}",
        "{{ self._TemplateReference__context.environment.from_string('x') }}",
    ],
)
def test_the_sandbox_holds(renderer: TemplateRenderer, template: str) -> None:
    """Nothing of Python, of the file system or of the messages can be reached or changed."""
    problem = problem_of(renderer, template)
    assert "root:" not in problem
    assert "uid=" not in problem


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",
    ],
    ids=["loops", "power"],
)
def test_one_that_does_not_end_is_killed(renderer: TemplateRenderer, template: str) -> None:
    """Also where Python itself would not come back to look at a clock."""
    assert "takes longer than 1 s" in problem_of(renderer, template)


@pytest.mark.skipif(sys.platform != "linux", reason="macOS takes no limit of the address space")
@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10 ** 9 }}",
        "{% set x = 'a' * 10 ** 8 %}{{ x * 10 }}{{ x * 10 }}",
        "{{ 'a'.center(10 ** 9) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ [0] * 10 ** 9 }}",
        "{% set ns = namespace(x='aaaaaaaa') %}"  # noqa: ISC004 - one template
        "{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    ],
)
def test_one_that_takes_all_memory(renderer: TemplateRenderer, template: str) -> None:
    """Its own process runs out of it, and nobody else."""
    assert "too much memory" in problem_of(renderer, template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ range(10 ** 9) | list }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{" * 100_000,
        "{{ " + "(" * 5000 + " }}",
        "{% if " + "not " * 5000 + "x %}{% endif %}",
        "{{ 1 / 0 }}",
        "{% unknown_tag %}",
        "{{ missing.field }}",
    ],
    ids=["range", "recursion", "braces", "nesting", "operators", "zero", "tag", "undefined"],
)
def test_one_that_fails(renderer: TemplateRenderer, template: str) -> None:
    """Whatever Python raises, or if it crashes: an error, and the next one renders."""
    problem_of(renderer, template)


def test_it_sees_nothing_of_the_server(
    renderer: TemplateRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the environment, where tokens are, nor any file: it could not even open one."""
    monkeypatch.setenv("HF_TOKEN", "secret-token")
    fresh = TemplateRenderer(PATIENCE_S)
    fresh.warm_up()
    fresh.render(PLAIN, USER, {})
    (worker,) = fresh._idle
    pid = worker._process.pid
    if sys.platform == "linux":
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        assert b"secret-token" not in environment
        limits = Path(f"/proc/{pid}/limits").read_text()
        (files,) = [line for line in limits.splitlines() if line.startswith("Max open files")]
        assert files.split()[3:5] == ["0", "0"]
    fresh.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_many_at_once(renderer: TemplateRenderer) -> None:
    """A hostile one in between disturbs none of the others."""
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"

    def one(number: int) -> str:
        if number % 5 == 0:
            with pytest.raises(TemplateError):
                render(renderer, endless)
            return "ended"
        return renderer.render(PLAIN, [{"role": "user", "content": str(number)}], {})

    with ThreadPoolExecutor(4) as threads:
        texts = list(threads.map(one, range(20)))
    expected = ["ended" if number % 5 == 0 else f"[user]{number}" for number in range(20)]
    assert texts == expected


def test_a_process_that_dies_is_replaced() -> None:
    """Between two prompts nobody notices."""
    renderer = TemplateRenderer(PATIENCE_S)
    assert renderer.render(PLAIN, USER, {}) == "[user]hi"
    (worker,) = renderer._idle
    worker._process.kill()
    worker._process.wait()
    assert renderer.render(PLAIN, USER, {}) == "[user]hi"
    renderer.close()


def test_a_folders_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that never ends is the caller's INVALID_ARGUMENT, and the same tokenizer goes on."""
    template = (
        "{% if messages[0].content == 'hang' %}"
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
        "{% endif %}" + PLAIN
    )
    write_byte_level(tmp_path, chat_template=template)
    renderer = TemplateRenderer(LIMIT_S)
    monkeypatch.setattr(tokenizer_module, "shared_renderer", lambda: renderer)
    tokenizer = MlxTokenizer.read(tmp_path, 0, None)
    with pytest.raises(InvalidFieldError, match="takes longer than 1 s"):
        tokenizer.render_chat(ChatPrompt((ChatMessage(Role.USER, "hang"),)))
    assert tokenizer.render_chat(ChatPrompt((ChatMessage(Role.USER, "go on"),))) == "[user]go on"
    renderer.close()


def test_memory_where_the_system_sets_no_limit() -> None:
    """As on macOS: the process is looked at from outside, and killed above the limit."""
    renderer = TemplateRenderer(
        limit_s=PATIENCE_S, memory_bytes=400 * 2**20, limits_address_space=False
    )
    try:
        assert render(renderer, PLAIN) == "[user]hi"
        # 3 GB in the end, 10 MB at a time.
        hog = (
            "{% set all = namespace(text='') %}{% for _ in range(300) %}"
            "{% set all.text = all.text + 'a' * 10000000 %}{% endfor %}"
        )
        assert "too much memory" in problem_of(renderer, hog)
    finally:
        renderer.close()


@pytest.mark.skipif(shutil.which("ps") is None, reason="ps is not installed")
@pytest.mark.parametrize("reader", [resident_bytes, resident_bytes_by_ps])
def test_another_process_memory(reader: Callable[[int], int]) -> None:
    """In bytes, and 0 for one that is gone."""
    ours = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert ours / 4 < reader(os.getpid()) <= 2 * ours
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert reader(gone.pid) == 0
