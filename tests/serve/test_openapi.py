"""The OpenAPI file is what the types say, and requests made from it never break the server of the demo model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from partinf.serve.app import Front
from partinf.serve.openapi import FILE, description, text
from tests.serve.support import Serving


def test_the_file_is_up_to_date() -> None:
    assert FILE.read_text() == text(), "run python -m partinf.serve.openapi"


def test_every_route_is_described(fake: Serving) -> None:
    served = [(route.path.replace(":path", ""), route.methods) for route in Front(["x"]).app.routes]  # type: ignore[attr-defined]
    routes = {(path, method) for path, methods in served for method in methods - {"HEAD"}}
    described = {(path, method.upper()) for path, item in description()["paths"].items() for method in item}
    assert routes == described | {("/openapi.json", "GET")}
    assert fake.get("/openapi.json")[1] == description()


def answerable() -> dict[str, Any]:
    """The file with what the demo model knows in it (its name, its 96 tokens, its roles), and with answers short enough for a test."""
    found = copy.deepcopy(description())
    schemas = found["components"]["schemas"]
    token, few = {"type": "integer", "minimum": 0, "maximum": 95}, {"type": "integer", "minimum": 1, "maximum": 8}
    schemas["TokenizeBody"]["properties"] |= {"model": {"enum": ["demo"]}, "messages": {"type": "null"}, "prompt": {"type": "string"}}
    schemas["TokenizeBody"]["required"] = ["prompt"]
    schemas["DetokenizeBody"]["properties"] |= {"model": {"enum": ["demo"]}, "tokens": {"type": "array", "items": token}}
    for name in ("CompletionBody", "ChatBody"):
        properties = schemas[name]["properties"]
        properties |= {"model": {"enum": ["demo"]}, "n": {"enum": [1, 3]}, "max_tokens": few}
        properties["stop_token_ids"]["items"] = token
        properties["logit_bias"]["propertyNames"] = {"pattern": "^[0-9]$"}
        for other in ("best_of", "max_completion_tokens", "min_tokens", "prompt_logprobs", "stream_options"):  # must agree with others
            properties.pop(other, None)
    schemas["CompletionBody"]["properties"]["prompt"] = {"type": "array", "items": token, "minItems": 1, "maxItems": 20}
    schemas["ChatBody"]["properties"]["messages"]["maxItems"] = 3
    schemas["Message"]["properties"] |= {"role": {"enum": ["user", "assistant"]}, "content": {"type": "string", "maxLength": 20}}
    schemas["Message"]["required"] = ["role", "content"]
    found["paths"]["/v1/models/{name}"]["get"]["parameters"][0]["schema"] = {"enum": ["demo"]}
    return found


# What the file promises of answers; which requests are refused depends on more than their form.
schemathesis.checks.load_all_checks()
CHECKS = schemathesis.checks.CHECKS.get_by_names(
    ["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"]
)


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_requests_made_from_the_shipped_file(demo: Serving, mode: GenerationMode) -> None:
    """Bodies that it allows, and bodies that it does not. It knows no model by name, so most of the former are for another one."""
    found = statuses(demo, demo.get("/openapi.json")[1], mode, examples=15)
    assert found["post /v1/completions"] & {400, 404}
    assert found["post /v1/chat/completions"] & {400, 404}
    if mode is GenerationMode.POSITIVE:
        assert found["get /health"] == found["get /metrics"] == found["get /v1/models"] == {200}


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_requests_that_the_model_can_answer(demo: Serving, mode: GenerationMode) -> None:
    """The same, close to what is right."""
    for name, found in statuses(demo, answerable(), mode, examples=20).items():
        assert (200 if mode is GenerationMode.POSITIVE else 400) in found, name


def statuses(serving: Serving, document: dict[str, Any], mode: GenerationMode, examples: int) -> dict[str, set[int]]:
    """What some requests of every operation were answered with; those that are read only have no body that could be wrong."""
    found = {}
    for each in schemathesis.openapi.from_dict(document).get_all_operations():
        operation = each.ok()
        if mode is GenerationMode.POSITIVE or operation.body:
            found[operation.label.lower()] = statuses_of(operation, mode, serving.url, examples if operation.body else 2)
    assert len([name for name in found if name.startswith("post")]) == (5 if mode is GenerationMode.POSITIVE else 4)
    serving.wait_idle()
    return found


def statuses_of(operation: Any, mode: GenerationMode, url: str, examples: int) -> set[int]:
    """Of some requests of one operation, none of which may be a failure of the server."""
    found = set()

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        response = case.call(base_url=url)
        assert response.status_code < 500, response.text
        case.validate_response(response, checks=CHECKS)
        found.add(response.status_code)

    check()
    assert found <= set(map(int, operation.definition.raw["responses"]))
    return found
