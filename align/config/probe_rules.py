"""Rules of the gradient probe: when its figures can be had as the configuration says."""

from align.config.sections import Keys

LINEAR_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo")  # linear in the advantage for the policy that sampled; dapo is TRL's own


def probe_problems(config: Keys) -> list[str]:
    """What about `weighting.probe` cannot be run as it stands."""
    probe, problems = config.weighting.probe, []
    if probe.features == "norms" and config.policy.lora is not None:
        problems.append("weighting.probe.features=norms: under policy.lora normalisation layers are frozen; take sketch")
    if probe.backward == "ordinary":
        problems += [
            f"weighting.probe.backward=ordinary: {reason}; take extra or auto" for reason in why_not_ordinary(config)
        ]
    if config.trl.get("torch_compile") and probe.features != "exact":
        problems.append(
            f"weighting.probe.features={probe.features} listens to layers that trl.torch_compile melts together: turn "
            "compilation off, or take exact"
        )
    if (config.trl.get("gradient_checkpointing_kwargs") or {}).get("use_reentrant"):
        problems.append(
            "weighting.probe needs gradients at single layers, which trl.gradient_checkpointing_kwargs.use_reentrant=True "
            "cannot give: set it to false"
        )
    return problems


def why_not_ordinary(config: Keys) -> list[str]:
    """Reasons why the training step's own backward does not hold the objectives' gradients; none when it does."""
    reasons, trl = [], config.trl
    if config.weighting.probe.features == "exact":
        reasons.append("exact needs backward passes of its own")
    if config.weighting.type == "mgda" and not config.weighting.floor:
        reasons.append("mgda brings weights to 0, and samples whose applied advantage is 0 cannot be read (floor is 0)")
    if trl.get("beta"):
        reasons.append(f"with trl.beta={trl['beta']} the ordinary backward holds the gradient of the KL penalty too")
    for key in ("entropy_coef", "use_adaptive_entropy"):
        if trl.get(key):
            reasons.append(f"with trl.{key}={trl[key]} the ordinary backward holds the gradient of the entropy bonus too")
    if trl.get("loss_type", "dapo") not in LINEAR_LOSSES:
        reasons.append(
            f"trl.loss_type={trl['loss_type']} is not linear in the advantages (those are {', '.join(LINEAR_LOSSES)})"
        )
    if trl.get("fp16"):
        reasons.append("with trl.fp16 the gradients of small advantages vanish before they can be read")
    return reasons
