"""Estimate of the traffic of one round over real sites, from messages with placeholder values."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.config import RunConfig
from fedtune.federation.protocol import CONFIRM, JOIN, UNMASK, Reply, RoundRequest, SumRequest
from fedtune.federation.secure import messages
from fedtune.federation.secure.agreement import Announcement, compute_modulus_bits
from fedtune.federation.secure.shares import SHARE_BYTES
from fedtune.federation.sent_round import pack_initial
from fedtune.federation.transport import Question
from fedtune.flower.flower_records import count_payload_bytes, from_adapter, from_question, from_reply, from_step
from fedtune.model.adapter import Adapter
from fedtune.model.ranks import cut_to_rank
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.release import Difference, Masked, Receipt, Tensors, Update
from fedtune.privacy.run_plan import Plan
from fedtune.sites.shared_settings import select_settings_for_sites, serialize_for_sites
from fedtune.tasks.task_model import TaskModel

_SESSION, _DIGEST, _SIGNATURE = "0" * 32, "0" * 64, "0" * 128
_FRACTION = 1 / 3  # a float with as many digits as noise multipliers and times have


def estimate_round_bytes(config: RunConfig, plan: Plan, model: TaskModel) -> tuple[int, int]:
    """Estimate the payload bytes of one round to a site and from a site, as run.json counts them.

    A round of secure aggregation has four exchanges; the estimate assumes an established session and no dropouts.
    The site has the largest of the sites' ranks. HTTP, TLS and Flower's own message records are not included.

    Args:
        config: the run's settings.
        plan: the run's plan.
        model: the model whose adapter is trained.

    Raises:
        ConfigError: the model is not available, so its hash is unknown.
    """
    sent, key = select_settings_for_sites(config), SigningKey(Ed25519PrivateKey.generate())
    proposal, adapter = sent.proposal(lead=key.public, plan=plan), Adapter.from_task_model(model)
    sites = config.federation.active
    site = max(sites, key=len)
    about: dict[str, Any] = {"proposal": proposal, "site": site, "expires": 1e9 + _FRACTION}
    source: dict[str, Any] = {"site": site, "run": proposal.run}
    made_up: dict[str, Any] = dict.fromkeys(("head", "site_key", "plan", "reply"), _DIGEST)
    made_up |= dict.fromkeys(("ended", "seeded_noise", "simulated"), False) | {"signature": _SIGNATURE}
    receipt = Receipt(**source, **made_up, charged_rounds=plan.num_rounds, sequence=100)
    session = "" if plan.shared is None else _SESSION
    request = RoundRequest(**about, round=plan.num_rounds, adapter_digest=_DIGEST, receipt=receipt, session=session)
    question = Question(site=site, signed=request.sign_with(key), settings=serialize_for_sites(sent))
    scores = (_FRACTION, _FRACTION) if plan.releases_metrics else None
    tensors = _make_placeholder_tensors(config, plan, adapter)
    update = Update(**source, round=plan.num_rounds, tensors=tensors, scores=scores)
    packed = pack_initial(adapter, config.federation.bound_algorithm)
    down = count_payload_bytes(from_question(question, from_adapter(packed)))
    up = count_payload_bytes(from_reply(Reply(body=update, receipt=receipt)))
    for step, parts, answer in _iter_secure_aggregation_steps(sites, site) if plan.shared else ():
        signed = SumRequest(**about, step=step, session=session, parts_digest=_DIGEST).sign_with(key)
        down += count_payload_bytes(from_question(Question(site=site, signed=signed, parts=parts), None))
        up += count_payload_bytes(from_step(answer))
    return down, up


def _make_placeholder_tensors(config: RunConfig, plan: Plan, adapter: Adapter) -> Tensors | Difference | Masked:
    """Build the payload of an update in the run's format, with all values 0."""
    if (shared := plan.shared) is not None:
        bits = compute_modulus_bits(shared.num_sites, shared.largest_value)
        return Masked(messages.compute_upload_size(shared.num_sites, length=adapter.num_values, bits=bits))
    trained = cut_to_rank(adapter.tensors, max(config.federation.ranks, default=None))
    if config.federation.update_dtype == "bfloat16":
        return Difference({name: np.zeros(value.shape, np.uint16) for name, value in trained.items()})
    return trained


def _iter_secure_aggregation_steps(sites: Sequence[str], site: str) -> Iterator[tuple[str, list[bytes], bytes]]:
    """Yield each step of secure aggregation except the upload as a tuple.

    The tuple contains the name of the step, the messages attached to the request to `site`, and the answer of `site`.
    """
    request = messages.ConfirmRequest(session=_DIGEST, release=1, survivors=sorted(sites))
    signed = {**asdict(request), "site": site, "signature": _SIGNATURE}
    announced = [Announcement(site=name, terms=_DIGEST, key=_DIGEST, signature=_SIGNATURE) for name in sites]
    sealed = base64.b64encode(bytes(messages.compute_sealed_size(len(sites)))).decode()
    helped: dict[str, Any] = {"confirmations": dict.fromkeys(sites, _SIGNATURE), "sealed": dict.fromkeys(sites, sealed)}
    shares = {name: {name: "0" * 2 * SHARE_BYTES} for name in sites}
    yield JOIN, [announcement.to_bytes() for announcement in announced], _DIGEST.encode()
    yield CONFIRM, [request.to_bytes()], messages.Confirmation(**signed).to_bytes()
    unmask, revealed = messages.UnmaskRequest(**asdict(request), **helped), messages.Revealed(**signed, shares=shares)
    yield UNMASK, [unmask.to_bytes()], revealed.to_bytes()
