"""Serving the page: its address, its style and policy, until it is interrupted."""

from __future__ import annotations

import errno
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import gradio as gr

FIRST_PORT, PORTS = 7860, 100
STYLE = Path(__file__).with_name("style.css")
# Browsers then fetch nothing from other servers, even if Gradio's page asks for it.
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


def launch(page: gr.Blocks, host: str, port: int | None) -> str:
    """Start to serve the page in threads; `page.close()` ends it.

    Args:
        page: from `build_page`.
        host: an address of this machine.
        port: None chooses the first free one from `FIRST_PORT`.

    Returns:
        The address of the page.

    Raises:
        OSError: the port is taken, or the host is not an address of this machine.
    """
    port = free_port(host, port)
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        mcp_server=False,
        footer_links=[],
        max_file_size="64mb",
        app_kwargs={"middleware": [_middleware()]},
        theme=_theme(),
        css_paths=STYLE,
    )
    name = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    return f"http://{f'[{name}]' if ':' in name else name}:{port}"


def free_port(host: str, port: int | None) -> int:
    """Return `port` if it is free, or the first free one from `FIRST_PORT` if it is None.

    Raises:
        OSError: the port is taken, or the host is not an address of this machine.
    """
    try:
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
    except socket.gaierror as error:
        raise OSError(f"--host is {host!r}, which is not an address ({error.strerror})") from error
    for candidate in range(FIRST_PORT, FIRST_PORT + PORTS) if port is None else [port]:
        try:
            with socket.create_server((host, candidate), family=family):
                return candidate
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise OSError(
                    f"can't listen on --host {host}, port {candidate}: {error.strerror}"
                ) from error
    if port is None:
        raise OSError(f"the ports {FIRST_PORT} to {FIRST_PORT + PORTS - 1} are taken; give --port")
    raise OSError(
        f"port {port} is taken; give another --port, or leave it out to take the first free one"
    )


def wait_for_the_end() -> None:
    """Wait for Ctrl+C or a request to terminate."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    while not ended.wait(timeout=1):  # without a timeout, Windows would not see Ctrl+C
        pass


class SelfContained:
    """ASGI middleware that sends `POLICY` with each response."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Any, send: Send) -> None:
        """Pass a request on."""

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", POLICY.encode())
                message["headers"] = [*message.get("headers", []), policy]
            await send(message)

        await self.app(scope, receive, send_with_policy)


def _middleware() -> Any:
    from starlette.middleware import Middleware

    return Middleware(SelfContained)


def _theme() -> Any:
    import gradio as gr

    theme = gr.themes.Default(
        primary_hue="indigo",
        neutral_hue="slate",
        radius_size="lg",
        font=["ui-sans-serif", "system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    return theme.set(body_background_fill="*neutral_50")
