"""The doctor on what lies outside the machine: the MLflow store, the Hub, the token. Each answers within seconds."""

import contextlib
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from pipeline.doctor_refusal import Finding, Patient, is_cached
from pipeline.errors import PipelineError

STORE_SECONDS = 10.0
HUB_SECONDS = 5.0
SECRETS = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)  # fmt: skip
SECRET_LENGTH = 4  # what is shorter is in many a word, and an address is shown without its user and password anyway
SECRET_KEY = re.compile("pass|token|key|secret|user|sig", re.IGNORECASE)
ADDRESSES = ("MLFLOW_TRACKING_URI", "MLFLOW_S3_ENDPOINT_URL", "HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def secrets() -> set[str]:
    """What must never be printed: tokens, and what addresses in the environment hold of users and passwords."""
    found = {os.environ.get(name, "") for name in SECRETS}
    for name in (*ADDRESSES, *map(str.lower, ADDRESSES)):
        with contextlib.suppress(ValueError):  # no address at all
            parts = urlsplit(os.environ.get(name, ""))
            user = parts.netloc.rpartition("@")[0]
            password = user.partition(":")[2]
            found |= {user, password, unquote(password)}
            found |= {value for key, value in parse_qsl(parts.query) if SECRET_KEY.search(key)}
    with contextlib.suppress(ImportError, OSError):
        from huggingface_hub import get_token

        found.add(get_token() or "")
    return {secret for secret in found if len(secret) >= SECRET_LENGTH}


def hide(text: str, hidden: set[str]) -> str:
    """The text without these secrets."""
    for secret in sorted(hidden, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def check_mlflow(patient: Patient) -> Iterator[Finding]:
    """Opens the project's experiment as a stage does (it makes a missing one) and writes one of its tags again."""
    from pipeline.tracking_store import (
        experiment_name,
        import_mlflow,
        open_store,
        outbox,
        probe,
        redact,
        sqlite_path,
        store_uri,
        unusable,
        within,
    )
    from pipeline.tracking_view import experiment_tags

    if patient.config is not None and not patient.config.runtime.tracking:
        yield Finding("ok", "not used (runtime.tracking=false)")
        return
    uri = store_uri()
    path = sqlite_path(uri)
    if path is not None and not path.exists() and os.access(path.parent, os.W_OK):
        yield Finding("ok", f"{path} is not there yet: the first training makes it")
        return

    def write() -> None:
        store = open_store()
        name, value = next(iter(experiment_tags().items()))
        store.client.set_experiment_tag(store.experiment_id, name, value)

    try:
        probe(uri)
        import_mlflow()
        within(STORE_SECONDS, write)
    except Exception as error:  # whatever MLflow, its database driver or the network raises
        found = str(error if isinstance(error, PipelineError) else unusable(uri, error))
        remedy = "mend it; no stage waits for it: `python -m pipeline.tracking sync` sends later what could not be sent"
        yield Finding("fail", found, remedy)
        return
    yield Finding("ok", f"{redact(uri)}: experiment {experiment_name()} can be read and written")
    waiting = list(outbox().glob("[!.]*/[!.]*"))
    if waiting:
        yield Finding(
            "warn", f"{len(waiting)} records wait in {outbox()}", "`python -m pipeline.tracking sync` sends them"
        )


def check_hub(patient: Patient) -> Iterator[Finding]:
    """Whether the Hub answers, and has the model of the settings at its revision for this user."""
    from huggingface_hub import constants

    model = patient.config.model if patient.config else None
    hub_id = model.hub_id if model else None
    data_id = patient.config.data.hub_id if patient.config else None
    if constants.HF_HUB_OFFLINE:
        if data_id is not None:
            text = f"offline (HF_HUB_OFFLINE), and data.hub_id={data_id} may not be in the cache"
            yield Finding("warn", text, "run prepare once with a network, or give data.path a file")
        if hub_id is None:  # else the check of the base says it
            yield Finding("ok", "offline (HF_HUB_OFFLINE); the base of these settings is here")
        return
    endpoint = constants.ENDPOINT
    try:
        request = urllib.request.Request(endpoint, method="HEAD", headers={"User-Agent": "lora-pipeline"})
        urllib.request.urlopen(request, timeout=HUB_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if model is None or ((hub_id is None or is_cached(model)) and data_id is None):
            yield Finding("ok", f"{endpoint} is out of reach ({reason}); these settings need nothing of it")
        else:
            found = f"{endpoint} is out of reach ({reason}), and {hub_id or data_id} is needed from it"
            remedy = (
                "look at the network, HTTPS_PROXY and HF_ENDPOINT; or bring the folder here: model=local, data=local"
            )
            yield Finding("fail", found, remedy)
        return
    if hub_id is None or model is None:
        yield Finding("ok", f"{endpoint} answers; these settings take no model from it")
    else:
        yield _model_on_hub(hub_id, str(model.revision))


def _model_on_hub(hub_id: str, revision: str) -> Finding:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    where = f"{hub_id} at {revision}"
    try:
        info: Any = HfApi(endpoint=constants.ENDPOINT).model_info(hub_id, revision=revision, timeout=HUB_SECONDS)
    except RevisionNotFoundError:
        return Finding("fail", f"the Hub has no {where}", f"see https://huggingface.co/{hub_id}/commits/main")
    except GatedRepoError:
        return _gated(hub_id)
    except RepositoryNotFoundError:
        return Finding("fail", f"the Hub has no {hub_id}, or it is private", "look at the name; `hf auth login`")
    except (HfHubHTTPError, OSError) as error:
        return Finding(
            "fail", f"the Hub does not tell of {where} ({type(error).__name__})", "try again; see HF_ENDPOINT"
        )
    from huggingface_hub import get_token

    if info.gated and get_token() is None:
        return _gated(hub_id)
    return Finding("ok", f"the Hub has {where}{', gated' if info.gated else ''}")


def _gated(hub_id: str) -> Finding:
    return Finding(
        "warn",
        f"{hub_id}: its owner lets in only who accepted the licence, and there is no token that shows it",
        f"accept it on https://huggingface.co/{hub_id}, then `hf auth login`",
    )


def check_token(patient: Patient) -> Iterator[Finding]:
    """Whether a token of the Hub is there; nothing of it is printed."""
    from huggingface_hub import get_token

    wanted = patient.config is not None and patient.config.model.hub_id is not None
    if get_token() is not None:
        yield Finding("ok", "a token of the Hub is there")
    elif wanted:
        text = "no token of the Hub: enough for open models, not for gated and private ones"
        yield Finding("warn", text, "`hf auth login`, or HF_TOKEN, where the model asks for one")
    else:
        yield Finding("ok", "no token of the Hub; these settings need none")
