"""Tools through unmodified clients against a real server: OpenAI's own (Python and Node), LangChain's, the loops of
pydantic-ai and of OpenAI's agents, and the command `llm`.

The built-in model is too small to choose well, so calls are required, and their arguments are short by their schema.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

import httpx
import openai
import pytest
from pydantic import BaseModel

pytestmark = [pytest.mark.clients, pytest.mark.cluster, pytest.mark.slow]

CONFIG = {"max_model_len": 2048, "engine": {"standby_engines": 0}, "sessions": {"spawn_interval": "100ms"}}
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Of a city", "parameters": CITY}}
ASK = [{"role": "user", "content": "How is the weather in Rome for two days?"}]
ONE_CALL = {"tool_choice": "required", "parallel_tool_calls": False, "temperature": 0}


@pytest.fixture(scope="module")
def server(launch):
    server = launch(CONFIG)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def official(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="python", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def model(official):
    return official.models.list().data[0].id


def good(arguments):
    """What the schema allows."""
    given = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert given.keys() == {"city", "days"}
    assert given["city"] in ("Rome", "Oslo")
    assert given["days"] in (1, 2)
    return given


def test_a_chat_calls_and_its_result_is_all_that_is_computed(official, model):
    first = official.chat.completions.create(model=model, messages=ASK, tools=[WEATHER], **ONE_CALL)
    [choice] = first.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    [call] = choice.message.tool_calls
    given = good(call.function.arguments)
    # As a client may spell it that has parsed it.
    message = choice.message.model_dump(exclude_none=True)
    message["tool_calls"][0]["function"]["arguments"] = json.dumps(given, indent=2, sort_keys=True)
    result = {"role": "tool", "tool_call_id": call.id, "content": "Sunny, 21 degrees."}
    second = official.chat.completions.create(
        model=model, messages=[*ASK, message, result], tools=[WEATHER], tool_choice="none", temperature=0, max_tokens=24
    )
    assert second.choices[0].message.tool_calls is None
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.total_tokens - 1


def test_a_streamed_chat_calls_the_same(official, model):
    whole = official.chat.completions.create(model=model, messages=ASK, tools=[WEATHER], **ONE_CALL)
    with official.chat.completions.stream(model=model, messages=ASK, tools=[WEATHER], **ONE_CALL) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    assert final.choices[0].finish_reason == "tool_calls"
    [streamed] = final.choices[0].message.tool_calls
    [call] = whole.choices[0].message.tool_calls
    assert streamed.function.arguments == call.function.arguments


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_calls_and_goes_on(official, model, stream):
    tool = {"type": "function", "strict": True, **WEATHER["function"]}
    asked = {"model": model, "input": ASK, "tools": [tool], **ONE_CALL}
    if stream:
        with official.responses.stream(**asked) as events:
            kinds = [event.type for event in events]
            first = events.get_final_response()
        assert kinds.index("response.output_item.added") < kinds.index("response.function_call_arguments.delta")
        assert kinds.index("response.function_call_arguments.done") < kinds.index("response.output_item.done")
    else:
        first = official.responses.create(**asked)
    [call] = first.output
    good(call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."}
    second = official.responses.create(
        model=model,
        input=[result],
        previous_response_id=first.id,
        tools=[tool],
        tool_choice="none",
        temperature=0,
        max_output_tokens=16,
    )
    assert second.output_text
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 1


def test_langchain_binds_and_calls(server, model):
    chat = pytest.importorskip("langchain_openai").ChatOpenAI
    messages = pytest.importorskip("langchain_core.messages")
    llm = chat(model=model, base_url=f"{server.url}/v1", api_key="langchain", temperature=0, timeout=120, max_retries=0)
    caller = llm.bind_tools([WEATHER], tool_choice="weather", parallel_tool_calls=False)
    history = [messages.HumanMessage(ASK[0]["content"])]
    reply = caller.invoke(history)
    [call] = reply.tool_calls
    good(call["args"])
    streamed = None
    for chunk in caller.stream(history):
        streamed = chunk if streamed is None else streamed + chunk
    assert [(one["name"], one["args"]) for one in streamed.tool_calls] == [(call["name"], call["args"])]
    history += [reply, messages.ToolMessage("Sunny.", tool_call_id=call["id"])]
    answer = llm.bind_tools([WEATHER], tool_choice="none").bind(max_tokens=16).invoke(history)
    assert answer.usage_metadata["input_token_details"]["cache_read"] >= reply.usage_metadata["total_tokens"] - 1


class Place(BaseModel):
    is_capital: bool


async def test_pydantic_ai_goes_round(server, model):
    """Its agent ends by a call of the tool that makes its output, so calls are required by itself."""
    pydantic_ai = pytest.importorskip("pydantic_ai")
    models = pytest.importorskip("pydantic_ai.models.openai")
    providers = pytest.importorskip("pydantic_ai.providers.openai")
    url = f"{server.url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="pydantic", max_retries=0, timeout=120) as client:
        agent = pydantic_ai.Agent(
            models.OpenAIChatModel(model, provider=providers.OpenAIProvider(openai_client=client)),
            output_type=pydantic_ai.ToolOutput(Place, name="place"),
            model_settings={"temperature": 0, "parallel_tool_calls": False},
        )
        first = await agent.run("Is Rome a capital?")
        assert isinstance(first.output.is_capital, bool)
        # Its history has the call and its result.
        second = await agent.run("And Milan?", message_history=first.all_messages())
        assert isinstance(second.output.is_capital, bool)


async def test_pydantic_ai_calls_a_users_function(server, model):
    pydantic_ai = pytest.importorskip("pydantic_ai")
    models = pytest.importorskip("pydantic_ai.models.openai")
    providers = pytest.importorskip("pydantic_ai.providers.openai")
    asked: list[str] = []

    def settings(context):
        choice = {"tool_choice": ["weather"], "parallel_tool_calls": False} if context.run_step == 1 else {}
        # It sends its whole history each time.
        return {"temperature": 0, "max_tokens": 64, "openai_store": False} | choice

    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="pydantic-tools", max_retries=0) as client:
        provider = providers.OpenAIProvider(openai_client=client)
        for kind in (models.OpenAIChatModel, models.OpenAIResponsesModel):
            agent = pydantic_ai.Agent(kind(model, provider=provider), model_settings=settings)

            @agent.tool_plain
            def weather(city: Literal["Rome", "Oslo"]) -> str:
                """Of a city."""
                asked.append(city)
                return "Sunny."

            result = await agent.run(ASK[0]["content"])
            assert result.output
            parts = [part.part_kind for message in result.all_messages() for part in message.parts]
            assert parts == ["user-prompt", "tool-call", "tool-return", "text"]
            # What came back was found in the cache.
            assert result.usage.cache_read_tokens > 0
    assert len(asked) == 2
    assert set(asked) <= {"Rome", "Oslo"}


async def test_openais_agents_go_round(server, model):
    agents = pytest.importorskip("agents")
    agents.set_tracing_disabled(True)
    asked: list[str] = []

    @agents.function_tool
    def weather(city: Literal["Rome", "Oslo"]) -> str:
        """Of a city."""
        asked.append(city)
        return "Sunny."

    # Required until the tool has been used, then as the model likes.
    settings = {"tool_choice": "required", "parallel_tool_calls": False, "temperature": 0, "max_tokens": 64}
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="agents", max_retries=0) as client:
        for kind in (agents.OpenAIChatCompletionsModel, agents.OpenAIResponsesModel):
            agent = agents.Agent(
                name="Forecaster",
                instructions="Answer in one short sentence.",
                model=kind(model=model, openai_client=client),
                # Its whole history is sent each time.
                model_settings=agents.ModelSettings(store=False, **settings),
                tools=[weather],
            )
            result = await agents.Runner.run(agent, ASK[0]["content"], max_turns=3)
            assert result.final_output
            assert [item.type for item in result.new_items] == [
                "tool_call_item",
                "tool_call_output_item",
                "message_output_item",
            ]
            assert result.context_wrapper.usage.input_tokens_details.cached_tokens > 0
            streamed = agents.Runner.run_streamed(agent, "And in Oslo?", max_turns=3)
            kinds = [event.type async for event in streamed.stream_events()]
            assert "raw_response_event" in kinds
            assert streamed.final_output
    assert len(asked) == 4
    assert set(asked) <= {"Rome", "Oslo"}


def test_the_node_client_calls(server, node):
    assert node("tools.mjs", server.url) == ["chat", "response"]


@pytest.fixture(scope="module")
def llm(server, model, tmp_path_factory):
    """The command `llm` as its users have it, told of the server: `llm(*arguments)` returns what it prints, and how it
    ended."""
    command = shutil.which("llm", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("no llm: pip install '.[test]' brings it")
    folder = tmp_path_factory.mktemp("llm")
    known = {"model_name": model, "api_base": f"{server.url}/v1", "supports_schema": True, "supports_tools": True}
    told = [{"model_id": "phi", **known}, {"model_id": "phi-responses", "responses": True, **known}]
    (folder / "extra-openai-models.yaml").write_text(json.dumps(told))
    environment = {**os.environ, "LLM_USER_PATH": str(folder), "LLM_LOAD_PLUGINS": ""}

    def run(*arguments):
        options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 120}
        return subprocess.run([command, *arguments], env=environment, check=False, **options)

    return run


@pytest.mark.parametrize("name", ["phi", "phi-responses"])
def test_llm_goes_on_with_a_chat_and_follows_a_schema(llm, name):
    first = llm("-m", name, "-o", "temperature", "0", "-o", "max_tokens", "24", "What is the capital of France?")
    assert (first.returncode, "Paris" in first.stdout) == (0, True), first.stderr
    again = llm("-c", "-o", "temperature", "0", "-o", "max_tokens", "24", "Say it again.")
    assert again.returncode == 0, again.stderr
    [logged] = json.loads(llm("logs", "-n", "1", "--json").stdout)
    # Its own record of what it was told: all that was said before was in the cache.
    assert json.loads(logged["token_details"])[DETAILS[name]]["cached_tokens"] > 20
    for streaming in ([], ["--no-stream"]):
        reply = llm("-m", name, "-o", "temperature", "0", "--schema", json.dumps(CITY), *streaming, "Which city?")
        assert reply.returncode == 0, reply.stderr
        good(reply.stdout)


DETAILS = {"phi": "prompt_tokens_details", "phi-responses": "input_tokens_details"}
FUNCTION = '''
def weather(days: int) -> str:
    """Of so many days."""
    return f"Sunny for {days} days."
'''


def test_llm_runs_a_users_function(llm, server):
    """It has no way to require a call. But beside a format a reply is either a call or JSON, so it can be told to begin
    with what only a call begins with; and so it calls again and again, as often as it may."""
    [first, *_] = httpx.post(f"{server.url}/tokenize", json={"prompt": "<tool_call>"}, timeout=30).json()["tokens"]
    options = ["-o", "temperature", "0", "-o", "max_tokens", "40", "-o", "logit_bias", json.dumps({str(first): 100})]
    reply = llm(
        "-m", "phi", *options, "--schema", "ok bool", "--functions", FUNCTION, "--td", "--cl", "2", "How is it?"
    )
    assert "Chain limit of 2 exceeded" in reply.stderr
    results = re.findall(r"Sunny for (-?\d+) days\.", reply.stderr)
    # Its result was sent, and another call came of it, which is one too many.
    assert len(results) == 1, reply.stderr
