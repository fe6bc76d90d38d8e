"""The Hugging Face Hub for the scripts in data/: checksums of downloaded files, remedies for errors of its client."""

import hashlib
import importlib.util
import os
import re
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator

from common import STOP

from nanofp8.files import console

if TYPE_CHECKING:
    import datasets

# The client's other protocol, Xet, is reported to stall for ever (xet-core issue 883); plain HTTP has timeouts
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")

# httpx, which the client uses, wants the package socksio for a SOCKS proxy even where another proxy serves
if (os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")) and not importlib.util.find_spec("socksio"):
    for name in ("ALL_PROXY", "all_proxy"):
        if os.environ.get(name, "").startswith("socks"):
            del os.environ[name]
if not importlib.util.find_spec("hf_transfer"):  # older clients fail without it, newer ones leave it alone
    os.environ.pop("HF_HUB_ENABLE_HF_TRANSFER", None)

PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")
TRY_AGAIN = "check the network or set HF_ENDPOINT to a mirror, then run the same command again"
SERVER_FAULT = "the server has a fault; run the same command again later, or set HF_ENDPOINT to a mirror"


class ChecksumError(OSError):
    """A downloaded file does not have the SHA-256 that the server states."""


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
    """Raise ChecksumError if a file does not have the SHA-256 that the server states. Say so if it states none."""
    name = Path(path).name
    if stated is None:
        console(f"{name}: the server states no SHA-256, so its content is not checked")
    elif (actual := file_sha256(path)) != stated:
        raise ChecksumError(f"{name} has the SHA-256 {actual}, but the server states {stated}")


def load(name: str, revision: str | None) -> tuple["datasets.Dataset", str | None]:
    """Load the train split of a data set on the Hub, after checking each file against the SHA-256 that the Hub states.

    revision: commit to load; None: the present one.
    Returns: the split, and its revision. In offline mode, if datasets has a copy in its cache: that copy, not checked,
        and None.
    Raises: any exception of the packages datasets and huggingface_hub.
    """
    import datasets
    from huggingface_hub import HfApi

    try:
        # Ask once, without the clients' minutes of retries, to report a missing network or a refusal at once
        revision = HfApi().dataset_info(name, revision=revision, timeout=10).sha
    except OSError as error:
        if not is_offline(error):
            raise
        try:
            split = datasets.load_dataset(name, split="train")
        except STOP:
            raise
        except BaseException:
            raise error from None  # of the two errors, this one says more
        console(f"{name}: offline mode, so a copy that was downloaded before is used and not checked")
        return split, None
    files = datasets.load_dataset_builder(name, revision=revision).config.data_files or {}
    for address in files.get("train", []):
        check_cached_file(address)
    return datasets.load_dataset(name, revision=revision, split="train"), revision


def check_cached_file(address: str) -> None:
    """Check a file of a data set, downloaded unless it is in the cache. If its SHA-256 is wrong, remove and refuse it.

    address: as datasets writes it, hf://datasets/OWNER/NAME@REVISION/PATH; others are left alone.
    Raises: ChecksumError, or what the Hub's client raises.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    match = re.fullmatch(r"hf://datasets/([^@]+)@([^/]+)/(.+)", address)
    if not match:
        return
    where = dict(repo_id=match[1], filename=match[3], repo_type="dataset", revision=match[2])
    stated = stated_sha256(get_hf_file_metadata(hf_hub_url(**where)))
    path = hf_hub_download(**where)
    try:
        check_sha256(path, stated)
    except ChecksumError:
        for cached in (os.path.realpath(path), path):  # the content, and the link to it
            Path(cached).unlink(missing_ok=True)
        raise


def related(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception, its cause or context, theirs, and so on, outermost first."""
    seen = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__  # suppressed ones too: libraries hide the response behind them


def is_offline(error: BaseException) -> bool:
    """Return whether an exception is due to the offline mode of the Hub's client."""
    return any(type(e).__name__ == "OfflineModeIsEnabled" for e in related(error))


def is_passing(error: BaseException) -> bool:
    """Return whether an exception without an answer of the server may pass: of the network, or of a broken download."""
    kinds = {kind.__name__ for kind in type(error).__mro__}  # httpx and requests have their own base classes
    return not kinds.isdisjoint({"ConnectionError", "TimeoutError", "gaierror", "TransportError", "ChecksumError"})


def wrong_setting(socks: bool = False) -> str:
    """Return what to change in the environment's variables for the Hub's client, "" if no fault can be seen.

    socks: whether an error speaks of SOCKS proxies.
    """
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        if (path := os.environ.get(name)) and not os.path.exists(path):
            return f"{name} names {path}, which does not exist; unset it"
    endpoint = os.environ.get("HF_ENDPOINT", "")
    if endpoint and not endpoint.startswith(("http://", "https://")):
        return f"HF_ENDPOINT={endpoint} must start with https://; correct it"
    for name in (name for base in PROXIES for name in (base, base.lower()) if os.environ.get(name)):
        value = os.environ[name]
        shown = re.sub(r"^(\w+://)?.*@", r"\1***@", value)  # without a password
        try:
            address = urllib.parse.urlsplit(value if "://" in value else f"http://{value}")
            well = address.scheme in ("http", "https", "socks5", "socks5h") and (address.port or True)
        except ValueError:
            well = False
        if not well:
            return f"{name}={shown} is not the address of a proxy, such as http://host:3128; correct or unset it"
        if address.scheme.startswith("socks") and socks:
            return f"{name}={shown} needs the package socksio; run: pip install socksio, or unset it"
    if not os.environ.get("HF_TOKEN", "").isascii():
        return "HF_TOKEN has characters that no token has; copy it again"
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        if (value := os.environ.get(name)) and not value.isdecimal():
            return f"{name}={value} is not a number of seconds; correct or unset it"
    return ""


def remedy(error: BaseException, data_set: str, otherwise: str = TRY_AGAIN) -> str:
    """Return what a user can do about an exception of the Hub's client.

    data_set: its name on the Hub. otherwise: if it is neither an answer of the server nor of the network.
    """
    errors = list(related(error))
    if is_offline(error):
        names = [name for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
                 if os.environ.get(name)]
        return f"offline mode is on; unset {' and '.join(names or ['HF_HUB_OFFLINE'])}, then run the same command again"
    response = next((e.response for e in errors if getattr(e, "response", None) is not None), None)
    if response is None and (wrong := wrong_setting(any("socks" in str(e).lower() for e in errors))):
        return f"{wrong}, then run the same command again"
    status = getattr(response, "status_code", None)
    if status is None:
        return TRY_AGAIN if any(map(is_passing, errors)) else otherwise
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
