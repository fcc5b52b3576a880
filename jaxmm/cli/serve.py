"""`jaxmm serve`."""

import os
import sys
from pathlib import Path

from jaxmm.cli.image_files import LOADING, Checkpoint, LoadingOptions, load_model
from jaxmm.cli.image_search import given_options, model_address
from jaxmm.inference.captioning import CAPTIONS
from jaxmm.inference.class_prompts import TEMPLATES
from jaxmm.inference.generate import Decoding
from jaxmm.inference.search import open_index
from jaxmm.optional import require_extra
from jaxmm.serving.limits import Limits
from jaxmm.validation import require

LIMITS = Limits()


def serve(
    model: Checkpoint, index: Path | None = None, host: str = "127.0.0.1", port: int = 8000, token: str | None = None,
    prompt: str | None = None, decoding: Decoding = CAPTIONS, templates: tuple[str, ...] = TEMPLATES,
    warm_up: bool = False, limits: Limits = LIMITS, loading: LoadingOptions = LOADING,
) -> None:
    """Serve a model: a web page and JSON endpoints.

    `jaxmm serve runs/MY_RUN` prints an address to open in the browser. The page offers what the model can do: caption
    an image, show where it looks for each word, answer questions, match texts, classify (with labels that you type, or
    with its own classes), and with --index search a folder of images by text or by image. Scripts send the same
    requests, for example

        curl -F image=@cat.jpg http://127.0.0.1:8000/caption

        curl -F image=@cat.jpg -F labels="a cat" -F labels="a dog" http://127.0.0.1:8000/classify

    /docs lists the endpoints, /openapi.json describes them for programs, /health and /metrics (Prometheus) are for
    monitoring. Requests that arrive together are computed together. Ctrl-C or SIGTERM stops the server after the
    requests that are running.

    Args:
        model: A repository of the hub, a folder, a file, or a run's workdir.
        index: Index of `jaxmm search index FOLDER INDEX --model MODEL`, of the same model.
        host: Address to listen at. Default: only this computer can connect; 0.0.0.0: all that reach it.
        port: Port to listen at; 0: any free one.
        token: What requests must send as `Authorization: Bearer TOKEN`. Default: the environment variable JAXMM_TOKEN;
            if that is not set either, none is needed.
        prompt: Beginning of every caption. Default: that of the model's training.
        decoding: Beam search of the captions.
        templates: Sentences with {} in the place of a typed label.
        warm_up: Compile the programs for short texts before the first request; otherwise the first ones wait for it.
        limits: Limits of requests.
        loading: How the model is read.
    """
    require_extra("serve", "jaxmm serve")
    from jaxmm.serving.app import make_app
    from jaxmm.serving.http_server import is_loopback, listen, run_server
    from jaxmm.serving.model_service import ModelService

    listening = listen(host, port)
    opened = None if index is None else open_index(index)
    if opened is not None:
        require((opened.model, opened.loading) == (model_address(model), given_options(loading)), "index",
                f"an index of {opened.model}", f"one of the model: jaxmm search index FOLDER INDEX --model {model}")
    token = token or os.environ.get("JAXMM_TOKEN") or None
    service = ModelService(load_model(model, loading), Path(os.path.expanduser(model)).name, index=opened,
                           prompt=prompt, decoding=decoding, templates=templates, limits=limits)
    if warm_up:
        print(f"compiling for up to {limits.batch} requests at a time", file=sys.stderr)
        service.warm_up()
    local = is_loopback(host)
    if not local and token is None:
        print(f"note: everyone who reaches {host} can use this server; --token asks for a token", file=sys.stderr)
    name = f"[{host}]" if ":" in host else host
    app = make_app(service, token=token, hosts={name, "127.0.0.1", "localhost"} if local else None)
    run_server(app, listening, lambda: print(
        f"{service.name} at http://{name}:{listening.getsockname()[1]} ({', '.join(service.offers)}); Ctrl-C stops it",
        flush=True))
    print("stopped")
