"""Rules of the gradient probe: when its figures can be had as the configuration says."""

from align.config.sections import Keys
from align.config.weighting import FromGradients

LINEAR_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo")  # linear in the advantage for the policy that sampled; dapo is TRL's own


def probe_key(config: Keys) -> str:
    """Where the options of the probe stand, see `Keys.probe`."""
    return "weighting.probe" if isinstance(config.weighting, FromGradients) else "domains.probe"


def probed(config: Keys) -> list[str]:
    """Names of what gradients are measured of: of the objectives where the scheme wants them, then of the domains."""
    objectives = list(config.objectives) if isinstance(config.weighting, FromGradients) else []
    follows = config.domains is not None and config.domains.type == "alignment"
    return objectives + [f"domain_{name}" for name in config.train_domains if follows]


def probe_problems(config: Keys) -> list[str]:
    """What about the probe of a run that measures gradients cannot be run as it stands."""
    probe, key, problems = config.probe, probe_key(config), []
    if probe.features == "norms" and config.policy.lora is not None:
        problems.append(f"{key}.features=norms: under policy.lora normalisation layers are frozen; take sketch")
    if probe.backward == "ordinary":
        problems += [f"{key}.backward=ordinary: {reason}; take extra or auto" for reason in why_not_ordinary(config)]
    if config.trl.get("torch_compile") and probe.features != "exact":
        problems.append(
            f"{key}.features={probe.features} listens to layers that trl.torch_compile melts together: turn "
            "compilation off, or take exact"
        )
    if (config.trl.get("gradient_checkpointing_kwargs") or {}).get("use_reentrant"):
        problems.append(
            f"{key} needs gradients at single layers, which trl.gradient_checkpointing_kwargs.use_reentrant=True "
            "cannot give: set it to false"
        )
    return problems


def why_not_ordinary(config: Keys) -> list[str]:
    """Reasons why the training step's own backward does not hold the gradients that are wanted; none when it does."""
    reasons, trl = [], config.trl
    if config.probe.features == "exact":
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
