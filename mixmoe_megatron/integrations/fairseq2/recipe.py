"""The recipe that trains both stages, on fairseq2's recipe API and from its wheel alone.

    python -m mixmoe_megatron.integrations.fairseq2.recipe OUTPUT_DIR --config-file FILE [--config KEY=VALUE ...]

The model says which stage it is: of stage 1 the LM groups train, on monolingual text; of stage 2 the MT groups, on
pairs. `model.config_overrides: {stage: 2}` makes the start of stage 2 of a model of stage 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq2.datasets import DataReader, SequenceBatch
from fairseq2.logging import log
from fairseq2.metrics import Mean, MetricBag, format_as_float
from fairseq2.metrics.common import (
    add_nll_loss_metric,
    add_seq_batch_metrics,
    update_nll_loss_metric,
    update_seq_batch_metrics,
)
from fairseq2.metrics.recorders import MetricDescriptor
from fairseq2.models.transformer_lm import TransformerLM
from fairseq2.recipe.base import Recipe, RecipeContext
from fairseq2.recipe.cli import main, register_cli_error
from fairseq2.recipe.composition import register_dataset
from fairseq2.recipe.config import (
    CommonSection,
    DatasetSection,
    GangSection,
    LRSchedulerSection,
    MixedPrecisionConfig,
    ModelSection,
    OptimizerSection,
    RegimeSection,
    TokenizerSection,
    TrainerSection,
)
from fairseq2.recipe.evaluator import EvalUnit
from fairseq2.recipe.trainer import TrainUnit
from fairseq2.runtime.dependency import DependencyContainer
from fairseq2.task import Task
from torch import Tensor, nn

from mixmoe_megatron.data.tokenizers import check_number_of_ids
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.integrations.fairseq2.aux_losses import group_aux_losses, mixmoe_ffns, recorded_router_logits
from mixmoe_megatron.integrations.fairseq2.corpora import (
    MONOLINGUAL_FAMILY,
    PARALLEL_FAMILY,
    MonolingualCorpus,
    ParallelCorpus,
    ReadOptions,
)
from mixmoe_megatron.integrations.fairseq2.native_tokenizer import MixMoETokenizer
from mixmoe_megatron.methods.mixmoe import GROUPS
from mixmoe_megatron.model.options import PAPER_AUX_LOSS_COEFF

_CORPUS_OF_STAGE: dict[int, tuple[type[Any], str]] = {
    1: (MonolingualCorpus, MONOLINGUAL_FAMILY),
    2: (ParallelCorpus, PARALLEL_FAMILY),
}


@dataclass(kw_only=True)
class CorpusSection(DatasetSection):
    """Which dataset, and how it becomes batches, see `ReadOptions`."""

    max_seq_len: int = 1024
    max_num_tokens: int = 8192
    shuffle_window: int = ReadOptions.shuffle_window
    prefetch: int = ReadOptions.prefetch

    def read_options(self, num_accumulate: int, seed: int, shuffle: bool) -> ReadOptions:
        """Return the options of a reader.

        Args:
            num_accumulate: batches of a step.
            seed: of the order.
            shuffle: False: documents as they come.
        """
        window = self.shuffle_window if shuffle else 1
        return ReadOptions(self.max_seq_len, self.max_num_tokens, num_accumulate, window, self.prefetch, seed)


@dataclass(kw_only=True)
class MixMoETrainConfig:
    """The recipe's configuration: fairseq2's sections, and what is ours.

    Attributes:
        valid_dataset: what `regime.validate_every_n_steps` measures; None: nothing.
        moe_aux_loss_coeff: weight of the aux losses (the paper's lambda).
    """

    model: ModelSection = field(default_factory=ModelSection)
    dataset: CorpusSection = field(default_factory=CorpusSection)
    valid_dataset: CorpusSection | None = None
    tokenizer: TokenizerSection = field(default_factory=TokenizerSection)
    gang: GangSection = field(default_factory=GangSection)
    trainer: TrainerSection = field(
        default_factory=lambda: TrainerSection(mixed_precision=MixedPrecisionConfig(mode="off"))
    )
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    lr_scheduler: LRSchedulerSection = field(default_factory=LRSchedulerSection)
    regime: RegimeSection = field(default_factory=RegimeSection)
    common: CommonSection = field(default_factory=CommonSection)
    moe_aux_loss_coeff: float = PAPER_AUX_LOSS_COEFF


class MixMoERecipe(Recipe):
    """Trains the group of a model's stage, the rest frozen."""

    @property
    def config_kls(self) -> type[object]:
        """The configuration's class."""
        return MixMoETrainConfig

    def register(self, container: DependencyContainer) -> None:
        """Register the validation data's section, the aux losses' names in logs, and our errors as one sentence."""
        register_dataset(container, "valid_dataset")
        for place, group in enumerate(GROUPS):
            shown = MetricDescriptor(f"{group}_aux_loss", f"{group.upper()} Aux Loss", 101 + place, format_as_float)
            container.collection.register_instance(MetricDescriptor, shown)
        register_cli_error(container, MixMoEError, _tell)

    def setup_model(self, context: RecipeContext, model: nn.Module, newly_initialized: bool) -> nn.Module:
        """Freeze all but the group that the stage trains: fairseq2 makes everything trainable after loading.

        Raises:
            MixMoEError: the model is none of this family, or is to be trained in a dtype that its routers may not have.
        """
        ffns = mixmoe_ffns(model)
        if not ffns:
            raise MixMoEError("The model has no Mix-MoE layers: model.name must be of the family mixmoe.")
        _check_precision(context.get_config_as(MixMoETrainConfig))
        model.requires_grad_(False)
        for ffn in ffns:
            ffn.trained_group.requires_grad_(True)
        return model

    def create_task(self, context: RecipeContext) -> Task:
        """Return the trainer.

        Raises:
            MixMoEError: model, tokenizer and dataset do not go together, or there is nothing to read.
        """
        config = context.get_config_as(MixMoETrainConfig)
        model = context.get_model_as(TransformerLM)
        tokenizer = context.get_tokenizer_as(MixMoETokenizer).text_tokenizer
        rows = model.decoder_frontend.embed.num_embeddings
        check_number_of_ids(f"The tokenizer in {tokenizer.directory}", tokenizer.vocab_size, rows)
        stage = len(list(mixmoe_ffns(model)[0].groups()))

        def reader(name: str, section: CorpusSection, num_accumulate: int, shuffle: bool) -> DataReader[SequenceBatch]:
            corpus: Any = context.get_dataset(name)
            kind, family = _CORPUS_OF_STAGE[stage]
            if not isinstance(corpus, kind):
                raise MixMoEError(
                    f"A model of stage {stage} trains on data of the family {family}: {name} is of another."
                )
            options = section.read_options(num_accumulate, config.common.seed, shuffle)
            return corpus.create_reader(tokenizer, context.gangs, options)

        dp_model = context.get_data_parallel_model()
        unit = MixMoETrainUnit(dp_model, model, config.moe_aux_loss_coeff)
        trained = reader("dataset", config.dataset, config.trainer.grad_accumulation.num_batches, shuffle=True)
        if config.valid_dataset is None:
            return context.create_trainer(unit, trained)
        validated = reader("valid_dataset", config.valid_dataset, 1, shuffle=False)
        return context.create_trainer(unit, trained, [MixMoEEvalUnit(dp_model)], [validated])


class MixMoETrainUnit(TrainUnit[SequenceBatch]):
    """One batch: cross-entropy on the targets, and the weighted aux losses of all groups.

    Args:
        dp_model: as data parallelism wraps it.
        model: the model itself.
        moe_aux_loss_coeff: weight of the aux losses.
    """

    def __init__(self, dp_model: nn.Module, model: nn.Module, moe_aux_loss_coeff: float) -> None:
        self._dp_model, self._model, self._coeff = dp_model, model, moe_aux_loss_coeff
        self._names = [f"{group}_aux_loss" for group, _ in zip(GROUPS, mixmoe_ffns(model)[0].groups(), strict=False)]

    def prepare_metric_bag(self, metric_bag: MetricBag) -> None:
        """Add the metrics: those of any language model, and an aux loss for each group."""
        add_nll_loss_metric(metric_bag)
        add_seq_batch_metrics(metric_bag)
        for name in self._names:
            metric_bag.add(name, Mean())

    def process_batch(self, batch: SequenceBatch, metric_bag: MetricBag) -> tuple[Tensor, int]:
        """Return the loss summed over the targets, and their number.

        A batch's aux losses weigh as much as its targets, so that the step's loss is mean cross-entropy plus their
        weighted mean.
        """
        with recorded_router_logits(self._model) as recorded:
            nll_loss, seqs_layout, target_batch = _nll_loss(self._dp_model, batch)
        aux_losses = group_aux_losses(self._model, recorded, seqs_layout)
        num_targets = target_batch.num_target_elements
        update_nll_loss_metric(metric_bag, nll_loss, num_targets)
        update_seq_batch_metrics(metric_bag, target_batch)
        with torch.no_grad():
            for name, value in zip(self._names, aux_losses.detach(), strict=True):
                metric_bag.get(name, Mean).update(value, weight=num_targets)
        return nll_loss + self._coeff * num_targets * aux_losses.sum(), num_targets


class MixMoEEvalUnit(EvalUnit[SequenceBatch]):
    """The cross-entropy of data that is held out.

    Args:
        dp_model: as data parallelism wraps it.
    """

    def __init__(self, dp_model: nn.Module) -> None:
        self._dp_model = dp_model

    def prepare_metric_bag(self, metric_bag: MetricBag) -> None:
        """Add the metrics of any language model."""
        add_nll_loss_metric(metric_bag)
        add_seq_batch_metrics(metric_bag)

    def process_batch(self, batch: SequenceBatch, metric_bag: MetricBag) -> None:
        """Add a batch to the metrics."""
        nll_loss, _, target_batch = _nll_loss(self._dp_model, batch)
        update_nll_loss_metric(metric_bag, nll_loss, target_batch.num_target_elements)
        update_seq_batch_metrics(metric_bag, target_batch)


def _nll_loss(dp_model: nn.Module, batch: SequenceBatch) -> tuple[Tensor, Any, SequenceBatch]:
    """Return the cross-entropy summed over the targets (scalar, float32), the input's layout, and the targets."""
    input_batch, target_batch = batch.as_auto_regressive()
    seqs, seqs_layout = input_batch.as_input()
    loss = dp_model(seqs, seqs_layout, targets=target_batch.seqs, target_mask=target_batch.target_mask)
    return loss, seqs_layout, target_batch


def _check_precision(config: MixMoETrainConfig) -> None:
    """Refuse what would make the routers anything but float32.

    Raises:
        MixMoEError: there is such a setting.
    """
    mixed = config.trainer.mixed_precision
    if mixed.mode == "static" and mixed.dtype != torch.float32:
        raise MixMoEError(
            "trainer.mixed_precision.mode static casts the routers too, which Mix-MoE keeps in float32: take auto, or "
            "off."
        )
    if config.model.dtype != torch.float32:
        raise MixMoEError(
            "model.dtype must be float32, in which routers and optimizer work: trainer.mixed_precision.mode auto "
            "computes the rest in bfloat16."
        )


def _tell(error: MixMoEError) -> int:
    """Log a mistake that a user can correct, and return the exit status."""
    log.error("{}", error)
    return 2


if __name__ == "__main__":
    main(MixMoERecipe())
