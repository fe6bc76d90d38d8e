"""The Hugging Face Hub for the scripts in data/: checksums of downloaded files, remedies for errors of its client."""

import hashlib
import os
import re
from pathlib import Path
from typing import Any, Iterator

TRY_AGAIN = "check the network or set HF_ENDPOINT to a mirror, then run the same command again"
SERVER_FAULT = "the server has a fault; run the same command again later, or set HF_ENDPOINT to a mirror"


def stated_sha256(metadata: Any) -> str | None:
    """Return the SHA-256 that the server states for a file; None if it states none (for small files in git).

    metadata: huggingface_hub's HfFileMetadata.
    """
    return metadata.etag if re.fullmatch(r"[0-9a-f]{64}", metadata.etag or "") else None


def file_sha256(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_sha256(path: str | os.PathLike, stated: str | None) -> None:
    """Raise OSError if a file does not have the SHA-256 that the server states. Say so if it states none."""
    name = Path(path).name
    if stated is None:
        print(f"{name}: the server states no SHA-256, so its content is not checked", flush=True)
    elif (actual := file_sha256(path)) != stated:
        raise OSError(f"{name} has the SHA-256 {actual}, but the server states {stated}")


def related(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception, its cause or context, theirs, and so on, outermost first."""
    seen = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__  # suppressed ones too: libraries hide the response behind them


def remedy(error: BaseException, data_set: str) -> str:
    """Return what a user can do about an exception of the Hub's client.

    data_set: its name on the Hub.
    """
    errors = list(related(error))
    if any(type(e).__name__ == "OfflineModeIsEnabled" for e in errors):
        names = [name for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
                 if os.environ.get(name)]
        return f"offline mode is on; unset {' and '.join(names or ['HF_HUB_OFFLINE'])}, then run the same command again"
    response = next((e.response for e in errors if getattr(e, "response", None) is not None), None)
    status = getattr(response, "status_code", None)
    if status is None:
        return TRY_AGAIN
    code = response.headers.get("X-Error-Code", "")
    request = getattr(response, "request", None)
    with_token = request is not None and "authorization" in {name.lower() for name in request.headers}
    if status == 429:
        seconds = response.headers.get("Retry-After", "")
        wait = f"{seconds} s" if seconds.isdigit() else "a few minutes"
        more = "" if with_token else "; it takes more of them with a token (`hf auth login`)"
        return f"the server takes no more requests for now; wait {wait}, then run the same command again{more}"
    if status == 401 and with_token:
        return ("the server refuses the token; correct HF_TOKEN or log in again (`hf auth login`), or remove it "
                "(unset HF_TOKEN, `hf auth logout`)")
    if code == "GatedRepo" or status == 403:
        login = "" if with_token else ", and log in (`hf auth login` or HF_TOKEN)"
        return f"the server does not let you read {data_set}; ask for access on its page{login}"
    if code == "RevisionNotFound":
        return f"the server no longer has the revision of {data_set} that was downloaded first; see data/README.md"
    if code == "EntryNotFound":
        return f"the server's {data_set} lacks this file; unset HF_ENDPOINT or set it to a full mirror"
    if status in (401, 404):
        return (f"the server does not have the data set {data_set}, or hides it without a login; check its name, or "
                "unset HF_ENDPOINT or set it to a full mirror")
    if status >= 500:
        return SERVER_FAULT
    return TRY_AGAIN
