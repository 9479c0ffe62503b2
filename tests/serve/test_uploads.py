"""Forms and pictures that clients send: read as what they are, and told what is wrong with them."""

import asyncio
import io
import json
import struct

import httpx
import pytest
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from ray_sd.config.serve import RequestLimits
from ray_sd.serve.errors import ApiError, BadRequestError, answer_api_error
from ray_sd.serve.forms import read_form
from ray_sd.serve.uploads import read_picture

IMAGE = ("image", ("a.png", b"picture"))
PROMPT = ("prompt", (None, "a"))


def sent(**settings: object) -> httpx.Response:
    """The answer to a form: its adapters and its files."""

    async def answer(request: Request) -> JSONResponse:
        settings, files = await read_form(request)
        adapters = [[one.name, one.weight] for one in settings.adapters]
        return JSONResponse({"adapters": adapters, "files": {name: one.decode() for name, one in files.items()}})

    app = Starlette(routes=[Route("/", answer, methods=["POST"])], exception_handlers={ApiError: answer_api_error})
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here")
    return asyncio.run(client.post("/", **settings))


def field(name: str, text: str) -> tuple[str, tuple[None, str]]:
    return (name, (None, text))


def test_adapters_of_a_form_are_names_or_json_in_any_order():
    fields = [
        field("adapters[]", "pet"),
        field("adapters", json.dumps({"name": "word", "weight": 0.5})),
        field("adapters[]", json.dumps(["a", {"name": "b"}])),
        field("adapters[]", "7"),
    ]
    answer = sent(files=[PROMPT, IMAGE, *fields])
    assert answer.json() == {
        "adapters": [["pet", 1.0], ["word", 0.5], ["a", 1.0], ["b", 1.0], ["7", 1.0]],
        "files": {"image": "picture"},
    }


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ([PROMPT], "image", "image: is missing"),
        ([PROMPT, IMAGE, IMAGE], "image", "image: one is drawn with, and several were sent"),
        ([PROMPT, IMAGE, ("photo", ("a.png", b""))], "photo", "photo: no such field"),
        ([PROMPT, IMAGE, field("adapters", "[" * 50_000)], "adapters.0.name", "at most 128 characters"),
        ([PROMPT, IMAGE, field("adapters", "[" * 500 + "]" * 500)], "adapters.0", "a valid dictionary"),
        ([PROMPT, IMAGE, *[field(f"a{number}", "") for number in range(40)]], None, "Too many fields"),
    ],
)
def test_what_is_wrong_with_a_form_is_told(fields: list, param: str | None, words: str):
    answer = sent(files=fields)
    error = answer.json().get("error", {}) if param else {"param": None, "message": answer.text}
    assert (answer.status_code, error["param"]) == (400, param)
    assert words in error["message"]


@pytest.mark.parametrize("charset", ["undefined", "punycode"])
def test_a_charset_that_reads_nothing_is_told(charset: str):
    body = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n\\ud800\r\n--b--\r\n'
    answer = sent(content=body, headers={"Content-Type": f"multipart/form-data; boundary=b; charset={charset}"})
    assert answer.status_code == 400
    assert "in the charset that it names; utf-8 can" in answer.json()["error"]["message"]


def test_who_leaves_while_sending_a_form_is_no_defect():
    messages = [{"type": "http.request", "body": b"--b", "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> dict:
        return messages.pop(0)

    scope = {"type": "http", "headers": [(b"content-type", b"multipart/form-data; boundary=b")]}
    with pytest.raises(BadRequestError, match="the client left before the end of the form"):
        asyncio.run(read_form(Request(scope, receive)))


def jpeg(tag: int = 0x010E, kind: int = 2, value: bytes = b"a") -> bytes:
    """Of 8 x 16 pixels that lie on their side, with one more field of EXIF."""
    fields = struct.pack(">HHIHxx", 0x0112, 3, 1, 6) + struct.pack(">HHII", tag, kind, 1, 38)
    content = io.BytesIO()
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + fields + bytes(4) + value
    Image.new("RGB", (8, 16)).save(content, "JPEG", exif=exif)
    return content.getvalue()


def test_a_picture_is_put_upright():
    assert read_picture(jpeg(), RequestLimits(), "image").size == (16, 8)


@pytest.mark.parametrize(("tag", "kind"), [(0x0100, 5), (0x010E, 5), (0x011A, 7)])
def test_damaged_metadata_do_not_decide_about_a_picture(tag: int, kind: int):
    assert read_picture(jpeg(tag, kind, struct.pack(">II", 1, 2)), RequestLimits(), "image").size == (16, 8)


def test_a_picture_that_is_large_once_it_is_decoded_is_told_before():
    content = io.BytesIO()
    Image.new("1", (8000, 8000)).save(content, "PNG")
    assert len(content.getvalue()) < 20_000
    with pytest.raises(BadRequestError, match="the picture has 8000x8000 pixels; at most 16777216 are read"):
        read_picture(content.getvalue(), RequestLimits(), "image")
