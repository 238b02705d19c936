"""One piece of work, from the contract's spec to its result: a directory in, files out.

Nothing here imports TensorFlow at its top, so that work on a .tflite never does.
"""

from importlib import metadata
from pathlib import Path

from pydantic import BaseModel

from app.domain import work as contract
from app.domain.edgetpu import AnalysisOptions, EdgeTpuAnalysis
from app.domain.formats import ModelFormat
from app.domain.problems import Note, WorkError
from app.domain.recipes import Cluster, Int8, Int16x8, Prune, Qat, Quantization, Step
from app.domain.work import (
    AnalyzeWork,
    CatalogWork,
    DataSource,
    InspectDatasetResult,
    InspectDatasetWork,
    InspectModelResult,
    InspectModelWork,
    PrepareResult,
    PrepareWork,
    TrainWork,
    VariantResult,
    VariantWork,
    Work,
)
from workers.engine import (
    convert,
    datasets,
    effects,
    inspect_tflite,
    learned,
    loaders,
    measure,
    quantize,
    verify,
)
from workers.engine.calibrate import Ranges, collect_ranges
from workers.engine.evaluate import Outputs
from workers.engine.names import find
from workers.engine.progress import as_stage, by_stage, rising, within
from workers.engine.samples import Emit, Samples
from workers.engine.targets import edgetpu
from workers.engine.targets.build import Built, build
from workers.engine.tidy import tidy

_TOOLS = ("ai-edge-litert", "litert-quantizer", "numpy")
_CALIBRATION_THREADS = 2
_ANALYSIS_LIMIT = 8 * 2**20
_TARGET_SAMPLES = 20


def run(work: Work, directory: Path, emit: Emit) -> BaseModel:
    """Do one piece of work in `directory` (inputs in `in/`, files made in `out/`).

    Returns the result that the contract names for the kind of work. Raises WorkError for causes
    that a user can understand; anything else is a bug. `emit` is told the stage and the progress
    of the whole work.
    """
    (directory / "out").mkdir(parents=True, exist_ok=True)
    emit = rising(emit)
    match work:
        case InspectModelWork():
            return inspect_model(work, directory, emit)
        case CatalogWork():
            from workers.engine import catalog

            return catalog.make(work, directory, emit)
        case InspectDatasetWork():
            emit("load", 0.0, None)
            path = directory / work.file
            facts = datasets.inspect_dataset(path, work.format, work.max_unpacked_bytes)
            emit("load", 1.0, None)
            return InspectDatasetResult(facts=facts)
        case AnalyzeWork():
            emit("analyze", 0.0, None)
            analysis = analyze((directory / work.file).read_bytes(), work.options)
            emit("analyze", 1.0, None)
            return analysis
        case PrepareWork():
            return prepare(work, directory, emit)
        case TrainWork():
            # Training imports TensorFlow; the rest of the work often does without.
            from workers.engine import training

            return training.train(work, directory, emit)
        case VariantWork():
            return variant(work, directory, emit)


def inspect_model(work: InspectModelWork, directory: Path, emit: Emit) -> InspectModelResult:
    """Facts of a model and, where asked for and all its shapes are fixed, its FLOAT_MODEL."""
    emit("load", 0.0, None)
    loaded = loaders.load(work.model, directory)
    facts = loaded.facts
    emit("inspected", 0.4, facts.model_dump_json())
    notes = list(facts.notes)
    made = None
    if work.convert and _fixed(facts.inputs, work.model.input_shapes):
        emit("convert", 0.4, None)
        try:
            content = convert.convert(loaded, within(emit, 0.4, 1.0))
        except WorkError as error:
            told = f"The conversion to a float32 .tflite failed: {error.message}"
            notes.append(Note(code=error.code, message=told))
        else:
            made = _write(directory, contract.FLOAT_MODEL, content)
    emit("convert" if work.convert else "load", 1.0, None)
    return InspectModelResult(facts=facts, float_model=made, notes=notes)


def analyze(content: bytes, options: AnalysisOptions) -> EdgeTpuAnalysis:
    """What the target makes of a file. Raises as `edgetpu.analyze` does, and `unsupported_model`
    where the answer would be huge: operators may share a name as long as the file."""
    analysis = edgetpu.analyze(content, options.compiler, options.multiple_subgraphs)
    told = sum(len(op.name) + len(op.layer) + len(op.message) for op in analysis.ops)
    if told > _ANALYSIS_LIMIT:
        raise WorkError(
            "unsupported_model",
            f"The analysis of the file's {len(analysis.ops)} operators has {told} characters,"
            f" more than {_ANALYSIS_LIMIT}.",
            "Export the model with shorter names of its layers, or in parts.",
        )
    return analysis


def prepare(work: PrepareWork, directory: Path, emit: Emit) -> PrepareResult:
    """What the variants share: the float32 .tflite, the baseline's figures, calibration ranges."""
    result = PrepareResult(tools=tools(tensorflow=_converts(work)))
    share = 1 / max(1, len(work.steps))
    turns = {step: within(emit, i * share, (i + 1) * share) for i, step in enumerate(work.steps)}

    if "convert" in turns:
        if work.model is None:
            raise ValueError("PrepareWork with step convert needs a model")
        turns["convert"]("convert", 0.0, None)
        content = convert.to_float_tflite(work.model, directory, turns["convert"])
        result.float_model = _write(directory, contract.FLOAT_MODEL, content)
    else:
        content = (directory / work.float_model).read_bytes()
    inputs, _ = inspect_tflite.tensor_facts(content)

    if "baseline" in turns:
        turn = turns["baseline"]
        turn("baseline", 0.0, None)
        samples = _samples(directory, work.evaluation_data, inputs)
        metrics, outputs, notes = measure.measure_baseline(
            content,
            samples,
            work.evaluation,
            work.latency,
            by_stage(as_stage(turn, "baseline"), {"evaluate": (0.0, 0.8), "latency": (0.8, 1.0)}),
        )
        result.baseline_metrics = metrics
        result.notes += notes
        if outputs is not None:
            outputs.save(directory / contract.BASELINE_OUTPUTS)
            result.baseline_outputs = contract.BASELINE_OUTPUTS

    if "calibrate" in turns:
        turn = turns["calibrate"]
        turn("calibrate", 0.0, None)
        samples = _samples(directory, work.calibration_data, inputs)
        if samples is None:
            raise ValueError("PrepareWork with step calibrate needs calibration_data")
        tidied = tidy(content)
        for index, options in enumerate(work.calibrations):
            total = len(work.calibrations)
            part = within(turn, index / total, (index + 1) / total)
            try:
                ranges = collect_ranges(tidied, samples, options, _CALIBRATION_THREADS, part)
            except WorkError as error:
                # The variants that need no ranges can be made all the same.
                result.calibrations.append(None)
                result.calibration_problems.append(error.problem())
                continue
            path = contract.calibration_file(index)
            ranges.save(directory / path)
            result.calibrations.append(path)
            result.calibration_problems.append(None)
    emit(work.steps[-1] if work.steps else "load", 1.0, None)
    return result


def variant(work: VariantWork, directory: Path, emit: Emit) -> VariantResult:
    """Make a variant from the float32 .tflite, verify it, measure it beside the baseline.

    The file is made from `float_model` alone, the trained one where the recipe trains; what it is
    compared with is the `original`.
    """
    emit("load", 0.0, None)
    float_model = (directory / work.float_model).read_bytes()
    original = float_model if work.original is None else (directory / work.original).read_bytes()
    source = inspect_tflite.tensor_facts(original)
    evaluation = _samples(directory, work.evaluation_data, source[0])
    calibration = _samples(
        directory, work.calibration_data, inspect_tflite.tensor_facts(float_model)[0]
    )

    emit("quantize", 0.02, None)
    content, notes = _made(work, directory, float_model, calibration, emit)

    emit("verify", 0.4, None)
    given = evaluation or calibration
    sample = given.read(0, 1) if given is not None and given.count else None
    verified = verify.verify(content, work.recipe, source, sample, work.effects)
    if effects.is_sparse(work.recipe):
        verify.check_sparse(content, float_model, sample)
    # A technique that told of its float operators knows more of them than the file does.
    notes += [note for note in verified if note.code not in {known.code for known in notes}]
    _write(directory, contract.VARIANT_FILE, content)

    built = Built()
    if work.target is not None:
        emit("compile", 0.42, None)
        few = given.read(0, min(_TARGET_SAMPLES, given.count)) if given is not None else None
        built = build(content, work.target, few or None, directory)

    emit("evaluate", 0.45, None)
    reference = None
    if work.baseline_outputs is not None:
        reference = Outputs.load(directory / work.baseline_outputs)
    metrics, found = measure.measure_variant(
        content,
        original,
        work.baseline_metrics,
        reference,
        evaluation,
        work.evaluation,
        work.latency,
        by_stage(emit, {"evaluate": (0.45, 0.85), "latency": (0.85, 1.0)}),
    )
    emit("latency", 1.0, None)
    notes += found + effects.size_note(work.recipe, metrics) + built.notes
    converted = effects.is_sparse(work.recipe) or _by_converter(work.recipe[-1])
    return VariantResult(
        target_files=built.files,
        metrics=metrics.model_copy(update=built.figures),
        notes=_unique(notes),
        tools=tools(tensorflow=converted) | built.tools,
    )


def tools(tensorflow: bool) -> dict[str, str]:
    """Name -> version of what made a result; the same versions make the same bytes."""
    names = (*_TOOLS, "tensorflow") if tensorflow else _TOOLS
    return {name: metadata.version(name) for name in names}


def _made(
    work: VariantWork,
    directory: Path,
    float_model: bytes,
    calibration: Samples | None,
    emit: Emit,
) -> tuple[bytes, list[Note]]:
    """The file that the recipe's last step makes of the float model, trained or not."""
    step = work.recipe[-1]
    turn = as_stage(within(emit, 0.02, 0.4), "quantize")
    if isinstance(step, Prune | Cluster):
        if not effects.is_sparse(work.recipe):
            return float_model, []
        source = _keras_source(work, "sparse_encoding")
        return convert.to_sparse_tflite(source, directory, turn), []
    if not isinstance(step, Qat) and step.engine == "converter":
        source = _keras_source(work, f'{step.technique} with engine "converter"')
        return convert.quantize_with_converter(source, directory, step, calibration, turn), []
    content = tidy(float_model)
    ranges, notes = _ranges(work, directory, content, calibration, within(turn, 0.0, 0.4))
    request = quantize.Request(
        float_model=content,
        step=step,
        ranges=ranges,
        samples=calibration,
        threads=_CALIBRATION_THREADS,
        emit=turn if ranges is None else within(turn, 0.4, 1.0),
    )
    made = quantize.apply(request)
    return made.content, notes + made.notes


def _ranges(
    work: VariantWork, directory: Path, content: bytes, samples: Samples | None, emit: Emit
) -> tuple[Ranges | None, list[Note]]:
    """Ranges for a step that needs them: those prepared, or collected here from a model that was
    trained since; with those that training learned. None where there are no samples."""
    step = work.recipe[-1]
    if not isinstance(step, Int8 | Int16x8 | Qat):
        return None, []
    if work.calibration is not None:
        ranges = Ranges.load(directory / work.calibration)
    elif samples is not None:
        ranges = collect_ranges(content, samples, step.calibration, _CALIBRATION_THREADS, emit)
    else:
        return None, []
    if work.learned_ranges is None:
        return ranges, []
    path = directory / work.learned_ranges
    ranges, matched, unmatched = learned.overlay(ranges, content, path)
    return ranges, [learned.note(matched, unmatched)]


def _by_converter(step: Step) -> bool:
    return isinstance(step, Quantization) and step.engine == "converter"


def _keras_source(work: VariantWork, what: str) -> contract.ModelSource:
    if work.model is None or work.model.format == ModelFormat.tflite:
        raise WorkError(
            "converter_needs_model",
            f"{what} needs the Keras model or SavedModel.",
            "Upload that instead of the .tflite, or leave out the option that asks for"
            " TensorFlow's converter.",
        )
    return work.model


def _samples(
    directory: Path, source: DataSource | None, inputs: list[contract.TensorFact]
) -> Samples | None:
    return None if source is None else datasets.load_part(directory, source, inputs)


def _fixed(inputs: list[contract.TensorFact], given: dict[str, list[int]]) -> bool:
    """Whether every size but the batch is known."""
    names = {fact.name: find(fact.name, list(given)) for fact in inputs}
    shapes = [given.get(names[fact.name] or "", fact.shape) for fact in inputs]
    return all(-1 not in shape[1:] for shape in shapes)


def _converts(work: PrepareWork) -> bool:
    return "convert" in work.steps and (
        work.model is not None and work.model.format != ModelFormat.tflite
    )


def _write(directory: Path, name: str, content: bytes) -> str:
    (directory / name).write_bytes(content)
    return name


def _unique(notes: list[Note]) -> list[Note]:
    return list({(note.code, note.message): note for note in notes}.values())
