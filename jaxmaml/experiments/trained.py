"""A trained run, which adapts to new classes or points and predicts, without its training data."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

import jaxmaml
from jaxmaml import stages
from jaxmaml.averaging import averaged
from jaxmaml.checks import check_choice, check_known
from jaxmaml.data import augmentation, datasets
from jaxmaml.data.augmentation import Augment
from jaxmaml.data.decoders import Decoder, Format, read_all
from jaxmaml.data.folders import FileRecords, FolderRecords
from jaxmaml.experiments import candidates, learners, networks, portable, ranges, supports
from jaxmaml.experiments.candidates import Spec
from jaxmaml.experiments.experiment import key_of, outer_optimizer
from jaxmaml.experiments.presets import Preset
from jaxmaml.experiments.run_dir import RunDir, preset_of, specs_of
from jaxmaml.types import Array, Batch, MetaParams, Params, State, as_stateful

Statistics: TypeAlias = Literal["support", "batch"]
"""With which statistics a run of norm="transductive" normalizes the examples that it predicts."""
STATISTICS = ("support", "batch")
CHUNK = 64
"""The most examples predicted at once, where they do not depend on each other."""
POLICIES = {
    "inductive": "the statistics of the support",
    "running": "the averages of the training",
    "per_step": "the averages of the training",
    "layer": "each example by itself",
    "group": "each example by itself",
    "none": "no normalization",
}
"""The statistics that normalize the inputs of a prediction, for each norm but the transductive."""
TRANSDUCTIVE = {
    "support": "the statistics of the support",
    "batch": "the statistics of the examples that are predicted together",
}


def load(run_dir: str | os.PathLike[str], label: str | None = None) -> "Trained":
    """Returns a trained run, ready to adapt to new classes. The training data need not be there.

    Its parameters are those that `jaxmaml train` tested: the last ones, or those that validation
    selected. Of a run whose best states are averaged in a further test, it is one of them, the best.

    Args:
        run_dir: a directory that `jaxmaml train` or `jaxmaml compare` wrote.
        label: the name of the run, for a directory that holds several.

    Raises:
        ValueError: the directory holds no run, several runs and no label is given, or the run is not
            finished, damaged, or of another version; or it is a policy.

    Example:
        >>> import contextlib, io, tempfile, numpy as np, jaxmaml
        >>> from jaxmaml import cli
        >>> command = "train sinusoid-5shot --num-outer-steps 2 --num-test-tasks 2".split()
        >>> with tempfile.TemporaryDirectory() as run_dir, contextlib.redirect_stdout(io.StringIO()):
        ...     exit_code = cli.main([*command, "--out", run_dir, "--num-validations", "0"])
        ...     trained = jaxmaml.load(run_dir)
        >>> x = np.linspace(0, 5, 10)
        >>> adapted = trained.adapt({"inputs": x, "targets": np.sin(x)})
        >>> adapted.predict([0.0, 2.5, 5.0]).shape
        (3, 1)
    """
    directory = RunDir(pathlib.Path(run_dir))
    config = directory.read_config()
    supports.check_takes_examples(preset_of(config))
    spec = _chosen(specs_of(config), label, directory.path)
    directory.verify_state(spec.label, config)

    # The state has the structure of one that starts to train.
    preset, shape = preset_of(config), tuple(config["input_shape"])
    num_classes = len((config["class_split"] or {"train": ()})["train"])
    network = networks.build(preset, shape, key_of(config["seed"], "parameters"))
    key = key_of(config["seed"], "parameters of a learner")
    learner = candidates.build(spec, preset, network.model, num_classes, key).learner
    optimizer = outer_optimizer(preset, network.model)
    like = jaxmaml.init_state(learner, optimizer, network.params, network.state)
    restored = averaged(directory.restore_state(spec.label, like, config))
    return Trained(
        spec=spec, preset=preset, input_shape=shape, num_classes=num_classes,
        matmul_precision=config["matmul_precision"],
        params=restored.params, state=restored.state,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Trained:
    """A trained run, as `load` returns it.

    Attributes:
        spec: its label, learner, order and inner rate.
        preset: its settings.
        input_shape: the shape of one example.
        num_classes: classes of its training split; 0 for regression.
        matmul_precision: the precision of matrix products in training, used here too.
        params, state: its meta-parameters (their average, if training kept one) and statistics.
    """

    spec: Spec
    preset: Preset
    input_shape: tuple[int, ...]
    num_classes: int
    matmul_precision: str
    params: MetaParams
    state: State

    @property
    def label(self) -> str:
        """The name of the run in its directory."""
        return self.spec.label

    @property
    def format(self) -> Format:
        """The form that pictures were decoded to in training."""
        return datasets.format_of(self.preset.dataset, self.input_shape)

    @property
    def num_inner_steps(self) -> int:
        """The inner steps after which the score of the run is quoted."""
        return learners.LEARNERS[self.spec.learner].headline_step(self.preset)

    def read_images(self, paths: Sequence[str | os.PathLike[str]]) -> np.ndarray:
        """Returns picture files as training decoded them, uint8 `[num_images, H, W, C]`.

        Raises:
            ValueError: a file is not a picture, or the run is regression.
        """
        self._check_classifies("pictures")
        records = FileRecords([pathlib.Path(path) for path in paths])
        return read_all(Decoder(records, self.format), len(records))

    def read_support(self, folder: str | os.PathLike[str]) -> dict[str, Any]:
        """Returns the pictures of a folder, which has one folder per class, as `adapt` takes them.

        Returns:
            {"inputs": uint8 `[num_images, H, W, C]`, "targets": `[num_images]`, "classes": the names
            of the folders, in their order}.

        Raises:
            ValueError: a class has no pictures, a file is not a picture, or the run is regression.
        """
        self._check_classifies("pictures")
        records = FolderRecords(pathlib.Path(folder), every_class=True)
        self._check_way(len(records.class_names))  # before anything is decoded
        inputs = read_all(Decoder(records, self.format), len(records))
        return {"inputs": inputs, "targets": records.labels(), "classes": records.class_names}

    def adapt(
        self,
        support: Mapping[str, Any] | str | os.PathLike[str],
        *,
        num_inner_steps: int | None = None,
        statistics: Statistics = "support",
    ) -> "Adapted":
        """Returns the model that is adapted to a support set.

        Args:
            support: a folder of pictures, see `read_support`; or a mapping with "inputs" and
                "targets". For a classifier the inputs are uint8 pixels `[n, H, W, C]` of the size of
                the training (they are scaled here as they were there), the targets are integers
                `[n]`, 0..way-1, and "classes" may hold the names of the classes. Classes may have
                different numbers of pictures, each of which counts the same. For regression both are
                numbers, `[n]` or `[n, 1]`.
            num_inner_steps: defaults to the number after which the score of the run is quoted.
            statistics: for a run of norm="transductive", what the pictures are normalized with that
                are predicted: "support", so that each prediction depends on the support alone; or
                "batch", the pictures that are given to one call of `predict`, as in training.

        Raises:
            TypeError: the inputs or targets, or the number of inner steps, have another type.
            ValueError: they have another shape or are not finite; there is one class only, or more
                classes than the head has outputs; the learner has no inner steps, or there are too
                many; the adapted parameters are not finite; or `statistics` has no effect.
        """
        if num_inner_steps is not None:
            most = ranges.MAX_INNER_STEPS
            ranges.check_whole("num_inner_steps", num_inner_steps, minimum=0, maximum=most)
        if not isinstance(support, Mapping):
            support = self.read_support(support)
        batch, classes = self._checked_support(support)
        self._check_statistics(statistics)
        served = _serve(
            self.spec, self.preset, self.input_shape, self.num_classes,
            max(1, len(classes)), statistics, num_inner_steps,
        )  # fmt: skip
        with stages.stage("adapting"), jax.default_matmul_precision(self.matmul_precision):
            params, state = jax.block_until_ready(served.adapt(self.params, self.state, batch))
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
            raise ValueError(
                "adapting to this support gave parameters that are not finite: fewer inner steps, or "
                "another run, may help"
            )
        return Adapted(
            trained=self, classes=classes, params=params, state=state,
            num_inner_steps=self.num_inner_steps if num_inner_steps is None else num_inner_steps,
            statistics=statistics, predict_fn=served.predict,
        )  # fmt: skip

    def checked_inputs(self, inputs: Any) -> np.ndarray:
        """Returns inputs `[n, ...]` as the run takes them.

        Raises:
            TypeError: they are not uint8 pixels, or for regression not numbers.
            ValueError: they have another shape, or are not finite.
        """
        if self.preset.is_regression:
            return supports.points("inputs", inputs)
        return supports.pixels(inputs, self.input_shape)

    def _checked_support(self, support: Mapping[str, Any]) -> tuple[Batch, tuple[str, ...]]:
        """Returns the support as a batch, and the names of its classes; none for regression."""
        for name in ("inputs", "targets"):
            if name not in support:
                raise ValueError(f"support must have {name!r}; got {sorted(support)}")
        inputs = self.checked_inputs(support["inputs"])
        if self.preset.is_regression:
            targets, classes = supports.points("targets", support["targets"]), ()
        else:
            targets = np.asarray(support["targets"])
            classes = supports.class_names(targets, support.get("classes"))
            self._check_way(len(classes))
        if len(targets) != len(inputs) or not len(inputs):
            raise ValueError(
                "support must have one target per input, and at least one; got "
                f"{len(targets)} and {len(inputs)}"
            )
        return {"inputs": inputs, "targets": targets}, classes

    def _check_way(self, way: int) -> None:
        if way < 2:
            raise ValueError("support has one class only: two or more are needed to tell apart")
        learners.check_way(way, self.preset.way, [self.spec.learner])

    def _check_statistics(self, statistics: str) -> None:
        check_choice("statistics", statistics, STATISTICS)
        if statistics == "batch" and self.preset.norm != "transductive":
            raise ValueError(
                f"statistics='batch' has no effect on a run of norm={self.preset.norm!r}: leave it out"
            )

    def _check_classifies(self, what: str) -> None:
        if self.preset.is_regression:
            raise ValueError(f"a run of {self.preset.name} predicts numbers and takes no {what}")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Adapted:
    """A model that is adapted to one support set, as `Trained.adapt` returns it.

    Attributes:
        trained: the run.
        classes: the names of the classes; none for regression.
        params: the adapted parameters.
        state: the statistics of the normalization; empty if there are none.
        num_inner_steps: the inner steps that were made.
        statistics: see `Trained.adapt`.
        predict_fn: `(params, state, inputs) -> predictions`, pure.
    """

    trained: Trained
    classes: tuple[str, ...]
    params: Params
    state: State
    num_inner_steps: int
    statistics: Statistics
    predict_fn: Callable[[Params, State, Any], Array]

    @property
    def policy(self) -> str:
        """The statistics by which the inputs of a prediction are normalized, in words."""
        norm = self.trained.preset.norm
        return POLICIES.get(norm) or TRANSDUCTIVE[self.statistics]

    @property
    def depends_on_batch(self) -> bool:
        """Whether a prediction depends on the other examples of the same call."""
        return self.trained.preset.norm == "transductive" and self.statistics == "batch"

    def predict(self, inputs: Any) -> np.ndarray:
        """Returns the probability of each class, or for regression the values.

        A prediction does not depend on the other inputs, except with statistics="batch".

        Args:
            inputs: as those of the support; see `Trained.adapt`.

        Returns:
            float32 `[n, way]`, whose rows add up to 1; or `[n, 1]`.

        Raises:
            TypeError, ValueError: the inputs are not such, or a prediction is not finite.
        """
        inputs = self.trained.checked_inputs(inputs)
        size = len(inputs) if self.depends_on_batch else CHUNK
        chunks = [inputs[i : i + size] for i in range(0, len(inputs), max(1, size))]
        outputs = [np.zeros((0, max(1, len(self.classes))), np.float32)]
        with stages.stage("predicting", len(inputs)) as advance:
            for chunk in chunks:
                outputs.append(self._predict(chunk))
                advance(len(chunk))
        predictions = np.concatenate(outputs)
        if not np.isfinite(predictions).all():
            raise ValueError("a prediction is not finite: fewer inner steps may help")
        return predictions

    def export(self, path: str | os.PathLike[str]) -> None:
        """Writes the model to a new directory, from which it runs without this package.

        The directory holds `function.jax`, the serialized `jax.export` of `inputs -> predictions` for
        any number of inputs, with the parameters and the scaling of the pixels in it;
        `parameters.npz`, the parameters by their paths; and `model.json`, which says what both are.

        Raises:
            ValueError: `path` exists, or cannot be written.
        """
        trained, params, state = self.trained, *jax.device_get((self.params, self.state))
        model = portable.Model(
            function=lambda inputs: self.predict_fn(params, state, inputs),
            input_shape=trained.input_shape,
            dtype=np.float32 if trained.preset.is_regression else np.uint8,
            trees={"params": params, "state": state},
            about=self._about(),
        )
        precision = jax.default_matmul_precision(trained.matmul_precision)
        with stages.stage("exporting the model"), precision:
            portable.write(model, pathlib.Path(path))

    def _about(self) -> dict[str, Any]:
        """Returns what model.json says of the model: what it takes, returns and comes from."""
        trained = self.trained
        output, preprocessing = "values [n, 1]", None
        if not trained.preset.is_regression:
            output = "probabilities [n, number of classes]"
            mean, std = datasets.scaling(trained.preset.dataset)
            preprocessing = portable.preprocessing(trained.format, mean, std)
        return {
            "classes": list(self.classes),
            "output": output,
            "preprocessing": preprocessing,
            "statistics": self.policy,
            "depends_on_batch": self.depends_on_batch,
            "learner": trained.spec.learner,
            "preset": trained.preset.name,
            "num_inner_steps": self.num_inner_steps,
        }

    def _predict(self, inputs: np.ndarray) -> np.ndarray:
        # Few sizes, so that few programs are compiled.
        num = len(inputs)
        if not self.depends_on_batch:
            padding = (1 << (num - 1).bit_length()) - num
            inputs = np.concatenate([inputs, np.zeros((padding, *inputs.shape[1:]), inputs.dtype)])
        with jax.default_matmul_precision(self.trained.matmul_precision):
            return np.asarray(self.predict_fn(self.params, self.state, inputs))[:num]


class _Served(NamedTuple):
    """The compiled programs for tasks of one size.

    Attributes:
        adapt: `(meta_params, state, support) -> (params, state)`.
        predict: `(params, state, inputs) -> predictions`.
    """

    adapt: Callable[[MetaParams, State, Batch], tuple[Params, State]]
    predict: Callable[[Params, State, Any], Array]


@functools.lru_cache(maxsize=64)
def _serve(
    spec: Spec,
    preset: Preset,
    input_shape: tuple[int, ...],
    num_classes: int,
    way: int,
    statistics: Statistics,
    num_inner_steps: int | None,
) -> _Served:
    """Returns the programs of a run for a number of classes; the same arguments, the same programs."""
    # The network and the learner, as `jaxmaml evaluate` builds them.
    entry = learners.LEARNERS[spec.learner]
    served_way = None if way == preset.way or entry.serves_any_way else way
    model = networks.build(preset, input_shape, jax.random.key(0), served_way=served_way).model
    served_preset = dataclasses.replace(preset, way=way)
    learner = candidates.build(spec, served_preset, model, num_classes, jax.random.key(0)).learner
    steps = entry.headline_step(preset) if num_inner_steps is None else num_inner_steps
    scaled = functools.partial(_scaled, preset)

    # A transductive network keeps the statistics of the support, with the adapted parameters.
    apply_fn, stored = as_stateful(model.apply_fn), None
    if preset.norm == "transductive" and statistics == "support":
        stored = networks.with_support_statistics(preset, input_shape, served_way=served_way)
        apply_fn = stored.test_fn

    def adapt(meta_params: MetaParams, state: State, support: Batch) -> tuple[Params, State]:
        batch = {**support, "inputs": scaled(support["inputs"])}
        adapted, info = learner.adapt(meta_params, batch, state=state, num_inner_steps=steps)
        if stored is None:
            return adapted, info.state
        return adapted, stored.train_fn(adapted, batch, stored.state)[1]

    def predict(params: Params, state: State, inputs: Array) -> Array:
        outputs, _ = apply_fn(params, {"inputs": scaled(inputs)}, state)
        outputs = outputs.astype(jnp.float32)
        return outputs if preset.is_regression else jax.nn.softmax(outputs)

    return _Served(jax.jit(adapt), jax.jit(predict))


def scaling(preset: Preset) -> Augment:
    """Returns how the pixels of a run's pictures are scaled."""
    mean, std = datasets.scaling(preset.dataset)
    return Augment(mean=mean, std=std)


def _scaled(preset: Preset, inputs: Array) -> Array:
    if preset.is_regression:
        return jnp.asarray(inputs)
    return augmentation.apply(scaling(preset), jnp.asarray(inputs), jax.random.key(0))


def _chosen(specs: Sequence[Spec], label: str | None, path: pathlib.Path) -> Spec:
    labels = [spec.label for spec in specs]
    if label is None and len(specs) > 1:
        listed = ", ".join(map(repr, labels))
        raise ValueError(
            f"{path} holds several runs: choose one of {listed} by its label (--run of the command)"
        )
    if label is not None:
        check_known("run", label, labels)
    return specs[0 if label is None else labels.index(label)]
