"""Tools through unmodified clients against a real server: OpenAI's own, LangChain's and pydantic-ai's loop.

The built-in model is too small to choose well, so calls are required, and their arguments are short by their schema.
"""

from __future__ import annotations

import json

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
