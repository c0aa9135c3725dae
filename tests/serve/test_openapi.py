"""The OpenAPI file is what the types say, and requests made from it never break the server."""

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


def bounded_description() -> dict[str, Any]:
    """The file with what the demo model knows in it (its name, its 96 tokens, its roles), and with answers short enough for a test."""
    found = copy.deepcopy(description())
    schemas = found["components"]["schemas"]
    token, few = {"type": "integer", "minimum": 0, "maximum": 95}, {"type": "integer", "minimum": 1, "maximum": 8}
    for name in ("CompletionBody", "ChatBody"):
        properties = schemas[name]["properties"]
        properties |= {"model": {"enum": ["demo"]}, "n": {"enum": [1, 3]}, "max_tokens": few}
        properties["stop_token_ids"]["items"] = token
        properties["logit_bias"]["propertyNames"] = {"pattern": "^[0-9]$"}
        for other in ("best_of", "max_completion_tokens", "stream_options"):  # must agree with others
            properties.pop(other, None)
    schemas["CompletionBody"]["properties"]["prompt"] = {"type": "array", "items": token, "minItems": 1, "maxItems": 20}
    schemas["ChatBody"]["properties"]["messages"]["maxItems"] = 3
    schemas["Message"]["properties"] |= {"role": {"enum": ["user", "assistant"]}, "content": {"type": "string", "maxLength": 20}}
    schemas["Message"]["required"] = ["role", "content"]
    return found


# What the file promises of answers; which requests are refused depends on more than their form.
schemathesis.checks.load_all_checks()
CHECKS = schemathesis.checks.CHECKS.get_by_names(
    ["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"]
)


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_requests_made_from_the_file(shared: Serving, mode: GenerationMode) -> None:
    """Bodies that the file allows, and bodies that it does not."""
    schema = schemathesis.openapi.from_dict(bounded_description())
    operations = [found.ok() for found in schema.get_all_operations()]
    asked = [operation for operation in operations if mode is GenerationMode.POSITIVE or operation.method == "post"]
    assert len(asked) >= 2
    for operation in asked:
        statuses = statuses_of(operation, mode, shared.url)
        assert statuses <= set(map(int, operation.definition.raw["responses"]))
        if operation.method == "post":
            assert 200 in statuses if mode is GenerationMode.POSITIVE else 400 in statuses
    shared.wait_idle()


def statuses_of(operation: Any, mode: GenerationMode, url: str) -> set[int]:
    """Answers to some requests of one operation, none of which may be a failure of the server."""
    statuses = set()

    @settings(
        max_examples=20 if operation.body else 2,
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
        statuses.add(response.status_code)

    check()
    return statuses
