"""The commands: their knobs, TRL's flags beside them, this project's defaults for these, and the settings given."""

import dataclasses
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from helpsteer_rloo.settings.flags import Flag, FlagValue, nearest_name, own_flags, trl_flags, unknown_name
from helpsteer_rloo.settings.knobs import DEFAULT_MODEL, PipelineKnobs, PlanKnobs, RewardKnobs, RLOOKnobs

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Knobs = TypeVar("Knobs", bound="DataclassInstance")


SECRETS = ("token", "hub_token", "push_to_hub_token", "use_auth_token")
"""Settings, and keys in settings, that no record may hold."""


def _without_secrets(values: Mapping[str, FlagValue]) -> dict[str, FlagValue]:
    return {
        name: _without_secrets(value) if isinstance(value, Mapping) else value
        for name, value in values.items()
        if name not in SECRETS
    }


@dataclass(frozen=True)
class Settings(Generic[Knobs]):
    """What a command was asked to do: our own knobs, and the values for TRL's configuration classes by flag name."""

    own: Knobs
    trl: dict[str, FlagValue]

    def describe(self) -> dict[str, FlagValue]:
        """All settings in one flat mapping, for records and comparisons; access tokens are left out."""
        return _without_secrets({**self.trl, **dataclasses.asdict(self.own)})


@dataclass(frozen=True)
class CommandSpec(Generic[Knobs]):
    """One command: its knobs, the TRL classes whose flags it takes, and this project's defaults for those."""

    program: str
    description: str
    knobs: type[Knobs]
    trl_classes: tuple[str, ...] = ()
    trl_defaults: Mapping[str, FlagValue] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    usage: str = "[FLAGS]"

    def flag_names(self) -> list[str]:
        """Names of all flags of the command."""
        return [flag.name for section in self.flags().values() for flag in section]

    def flags(self) -> dict[str, list[Flag]]:
        """The command's flags by section of the help."""
        own = own_flags(self.knobs)
        names = {flag.name for flag in own} | set(self.refused)
        rest = [flag for flag in trl_flags(*self.trl_classes) if flag.name not in names]
        shown = [
            dataclasses.replace(flag, default=str(self.trl_defaults[flag.name]))
            if flag.name in self.trl_defaults
            else flag
            for flag in rest
        ]
        return {"main flags": own, "flags of TRL": shown} if self.trl_classes else {"flags": own}

    def explain_unknown(self, name: str, what: str = "key") -> str:
        """The message for a name that is not a flag of this command."""
        if name in self.refused:
            return f"{name} cannot be set here: {self.refused[name]}"
        known = [*self.flag_names(), *(["config"] if what == "flag" else [])]
        if issubclass(self.knobs, PipelineKnobs):
            of_stages = {flag for command in SECTIONS.values() for flag in command.flag_names()} - set(known)
            meant = name if name in of_stages else nearest_name(name, [*known, *sorted(of_stages)])
            stages = [stage for stage, command in SECTIONS.items() if meant in of_stages & set(command.flag_names())]
            if stages:
                found = f"{name} belongs" if meant == name else f"unknown {what} {name!r}; {meant} belongs"
                return f"{found} to a stage: give " + " or ".join(f"--{stage}.{meant}" for stage in stages)
        stage, _, bare = name.partition(".")
        if stage in SECTIONS and bare in known and not issubclass(self.knobs, PipelineKnobs):
            return f"unknown {what} {name!r}; it is {bare!r} here, where there is one stage"
        return unknown_name(name, known, what)

    def resolve(self, *layers: Mapping[str, FlagValue], source: str = "configuration") -> Settings[Knobs]:
        """Merge layers of values, weakest first, over the defaults.

        Raises:
            ValueError: an unknown key (with the nearest known one), a value of the wrong type, or two names for one
                setting in the same layer.
        """
        flags = {flag.name: flag for section in self.flags().values() for flag in section}
        merged: dict[str, FlagValue] = dict(self.trl_defaults)
        for layer in layers:
            merged |= self._checked(layer, flags, source)
        own_names = {flag.name for flag in own_flags(self.knobs)}
        own = self.knobs(**{key: value for key, value in merged.items() if key in own_names})
        return Settings(own, {key: value for key, value in merged.items() if key not in own_names})

    def _checked(self, layer: Mapping[str, FlagValue], flags: Mapping[str, Flag], source: str) -> dict[str, FlagValue]:
        checked: dict[str, FlagValue] = {}
        for key, value in layer.items():
            name = self.aliases.get(key, key)
            if key != name and name in layer:
                raise ValueError(f"{source}: {key} and {name} are two names of one setting; give one of them.")
            if key not in flags:
                raise ValueError(f"{source}: {self.explain_unknown(key)}")
            try:
                checked[name] = flags[name].from_yaml(value)
            except ValueError as error:
                raise ValueError(f"{source}: {key}: {error}") from None
        return checked


_TRAINER_CLASSES = ("TrainingArguments", "BaseConfig")

REWARD = CommandSpec(
    program="reward_model_training.py",
    description="Train a reward model on preference pairs, save it, reload it, and verify it on held-out pairs.",
    knobs=RewardKnobs,
    trl_classes=(*_TRAINER_CLASSES, "RewardConfig", "ModelConfig"),
    trl_defaults={
        "model_name_or_path": DEFAULT_MODEL,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "learning_rate": 1e-5,
        "num_train_epochs": 3.0,
        "lora_r": 16,
        "lora_alpha": 32,
        "save_steps": 100,
        "save_total_limit": 2,
    },
    refused={
        "chat_template_path": "the chat template is the tokenizer's own.",
        "label_smoothing_factor": "it is that of classification; --label_smoothing is that of preferences.",
        "resume_from_checkpoint": "an interrupted run goes on by itself when the same command is given again.",
        "save_only_model": "a run goes on from its checkpoints, for which they need the optimizer's state.",
        "parallelism_config": "it comes from accelerate's own configuration: accelerate config.",
    },
)

RLOO = CommandSpec(
    program="rloo_helpsteer_training.py",
    description="Train a policy with RLOO (REINFORCE leave-one-out) against a trained reward model.",
    knobs=RLOOKnobs,
    trl_classes=(*_TRAINER_CLASSES, "RLOOConfig", "ModelConfig"),
    trl_defaults={
        "model_name_or_path": DEFAULT_MODEL,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 8,
        "learning_rate": 1e-6,
        # TRL's default leaves a LoRA dropout of 0.05 on, with another mask in every pass: log-probabilities of the
        # same tokens under the same weights then differ between the pass that sets the ratio's base and the training.
        "disable_dropout": True,
        "lora_r": 16,
        "lora_alpha": 32,
        "save_steps": 50,
        "save_total_limit": 2,
    },
    aliases={
        "num_generations": "rloo_k",
        "num_iterations": "num_ppo_epochs",
        "beta": "kl_coef",
        "epsilon": "cliprange",
        "max_completion_length": "response_length",
    },
    refused={
        "steps_per_generation": "it follows from --num_mini_batches.",
        "generation_batch_size": "it follows from batch size, accumulation and --num_mini_batches.",
        "max_steps": "it follows from --total_episodes.",
        "num_train_epochs": "the length of the run is --total_episodes.",
        "eval_strategy": "the pipeline judges the policy after training, on held-out prompts.",
        "do_eval": "the pipeline judges the policy after training, on held-out prompts.",
        "chat_template_kwargs": "the rendering is the reward model's; --thinking of reward training decides.",
        "resume_from_checkpoint": "an interrupted run goes on by itself when the same command is given again.",
        "save_only_model": "a run goes on from its checkpoints, for which they need the optimizer's state.",
        "parallelism_config": "it comes from accelerate's own configuration: accelerate config.",
        "restore_callback_states_from_checkpoint": "what a run goes on with is restored in any case.",
    },
)

PIPELINE = CommandSpec(
    program="train_pipeline.py",
    description=(
        "Data, reward model, verification, RLOO, evaluation and summary, in one resumable run.\n\n"
        "Any flag of reward_model_training.py is given as --reward.FLAG, and any of rloo_helpsteer_training.py as\n"
        "--rloo.FLAG; their --help lists them."
    ),
    knobs=PipelineKnobs,
    refused={"demo": "the file describes the demo; run it with helpsteer-rloo demo --config FILE."},
)

PLAN = CommandSpec(
    program="helpsteer-rloo plan",
    description=(
        "What a run will need in memory and time, stage by stage, before anything is downloaded.\n\n"
        "Takes the flags of train_pipeline.py, those of single stages as --reward.FLAG and --rloo.FLAG among them."
    ),
    knobs=PlanKnobs,
    refused=PIPELINE.refused,
)

SECTIONS: dict[Literal["reward", "rloo"], CommandSpec[Any]] = {"reward": REWARD, "rloo": RLOO}


@contextmanager
def flags_named_of(stage: Literal["reward", "rloo"]) -> Generator[None]:
    """Within, errors name flags of a stage as the pipeline takes them: --reward.FLAG, unless FLAG is also its own.

    Raises:
        ValueError: as within, with these names.
    """
    names = set(SECTIONS[stage].flag_names()) - set(PIPELINE.flag_names())

    def of_stage(found: re.Match[str]) -> str:
        return f"--{stage}.{found[1]}" if found[1] in names else found[0]

    try:
        yield
    except ValueError as error:
        raise ValueError(re.sub(r"--(\w+)\b(?!\.\w)", of_stage, str(error))) from None


DEFAULT_SEED = 42
"""transformers' own."""


def ensemble(settings: Settings[RewardKnobs]) -> list[Settings[RewardKnobs]]:
    """The settings of each reward model of an ensemble: directories and seeds of their own."""
    own, members = settings.own, [settings]
    for number in range(2, own.ensemble + 1):
        trl = {**settings.trl, "seed": seed_of(settings) + number - 1}
        members.append(Settings(dataclasses.replace(own, output_dir=f"{Path(own.output_dir)}_{number}"), trl))
    return members


def seed_of(settings: Settings[Any]) -> int:
    """The seed of a training."""
    return int(settings.trl.get("seed", DEFAULT_SEED))


@dataclass(frozen=True)
class PipelineSettings:
    """The settings of a whole run and of its two training stages."""

    own: PipelineKnobs
    reward: Settings[RewardKnobs]
    rloo: Settings[RLOOKnobs]
    guard: Settings[RewardKnobs] | None = None

    @property
    def run_dir(self) -> str:
        """Directory of the run's record."""
        return self.own.output_dir or f"runs/{self.own.name}"
