# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Programs that run a trained network: PyTorch itself, its compiler, bfloat16, ONNX Runtime, OpenVINO."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch

from custom.inferers.slices import AxialSliceInferer

__all__ = ["BACKENDS", "BackendSliceInferer", "NetworkBackend", "export_onnx"]

Runner = Callable[[torch.Tensor], torch.Tensor]

# What each backend needs beside torch.
BACKENDS: dict[str, tuple[str, ...]] = {
    "torch": (),
    "compile": (),
    "bf16": (),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
}


def export_onnx(network: torch.nn.Module, image: torch.Tensor) -> bytes:
    """An ONNX model of a network as it evaluates, with a free batch size.

    Args:
        network: maps (N, C, H, W) to (N, K, H, W), in evaluation mode; it stays as it is.
        image: an input of the height and width that the model is for, (N, C, H, W) on the network's device.

    Returns:
        The model: input ``image``, output ``logits``, the weights inside.

    Raises:
        ModuleNotFoundError: When ``onnx`` or ``onnxscript`` is not installed.
        ValueError: When the network is in training mode.
    """
    _require("ONNX export", ("onnx", "onnxscript"))
    if network.training:
        raise ValueError("the network is in training mode, call its eval() before it is exported")
    example = image.new_zeros((2, *image.shape[1:]))  # a batch of 1 would be taken for a constant
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            program = torch.onnx.export(
                network,
                (example,),
                input_names=["image"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                dynamo=True,
                verbose=False,
            )
        finally:
            logging.disable(level)
    if program is None:
        raise RuntimeError("torch.onnx.export gave no program")
    return program.model_proto.SerializeToString()


class NetworkBackend:
    """A network that computes the same by other means; it is built at its first call, for its weights then.

    It is built anew for another height or width, and where the weights have changed.

    Args:
        network: maps (N, C, H, W) to (N, K, H, W), every image alone; in evaluation mode when it is called.
        backend: ``"torch"``: the network itself; ``"compile"``: torch.compile, needs a C++ compiler on a
            CPU; ``"bf16"``: autocast to bfloat16, in which masks differ a little; ``"onnx"``: ONNX Runtime
            on the CPU; ``"openvino"``: OpenVINO on the CPU, float32. The last two use as many threads as
            torch does.

    Raises:
        ValueError: When the backend is unknown.
        ModuleNotFoundError: When a library that it needs is not installed.
    """

    def __init__(self, network: torch.nn.Module, backend: str = "torch") -> None:
        _check(backend)
        self.network = network
        self.backend = backend
        self._runners: dict[tuple[int, ...], Runner] = {}
        self._weights: tuple = ()

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """
        Args:
            image: (N, C, H, W).

        Returns:
            (N, K, H, W), float32 unless the network itself gives another type.

        Raises:
            ValueError: When the network is in training mode, or not where the backend computes.
        """
        if self.backend == "torch":
            return self.network(image)
        if self.network.training:
            raise ValueError(f"backend {self.backend} is for inference; call the network's eval() first")
        if self.backend in ("onnx", "openvino") and image.device.type != "cpu":
            raise ValueError(
                f"backend {self.backend} computes on the CPU and the image is on {image.device}; "
                "set device to $torch.device('cpu'), or backend to torch, compile or bf16"
            )
        weights = _fingerprint(self.network)
        if weights != self._weights:
            self._runners, self._weights = {}, weights
        size = tuple(image.shape[1:])
        if size not in self._runners:
            self._runners[size] = _BUILDERS[self.backend](self.network, image)
        return self._runners[size](image)


class BackendSliceInferer(AxialSliceInferer):
    """:class:`AxialSliceInferer` that runs the network it is given by a backend of choice.

    Whoever calls it with a network of torch, such as an evaluator or MONAI Label, need not know.

    Args:
        batch_size: slices in one forward pass.
        flip: whether to run every slice mirrored from left to right too, and average the logits.
        progress: whether to show a bar over the slices of a volume.
        backend: as :class:`NetworkBackend` takes it.

    Raises:
        ValueError: When ``batch_size`` is below 1 or the backend unknown.
        ModuleNotFoundError: When a library that the backend needs is not installed.
    """

    def __init__(
        self, batch_size: int = 8, flip: bool = False, progress: bool = False, backend: str = "torch"
    ) -> None:
        super().__init__(batch_size, flip, progress)
        _check(backend)
        self.backend = backend
        self._network: NetworkBackend | None = None

    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """
        Args:
            inputs: (B, C, H, W) or (B, C, H, W, D), as :class:`AxialSliceInferer` takes them.
            network: maps (N, C, H, W) to (N, K, H, W); a module of torch, unless the backend is torch.

        Returns:
            (B, K, H, W) or (B, K, H, W, D).

        Raises:
            TypeError: When a backend other than torch is given anything but a module and an image.
        """
        if self.backend == "torch":
            return super().__call__(inputs, network, *args, **kwargs)
        if not isinstance(network, torch.nn.Module) or args or kwargs:
            raise TypeError(f"backend {self.backend} runs a torch.nn.Module of one image; use backend torch")
        if self._network is None or self._network.network is not network:
            self._network = NetworkBackend(network, self.backend)
        return super().__call__(inputs, self._network)


def _check(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    _require(f"backend {backend}", BACKENDS[backend])


def _require(what: str, libraries: tuple[str, ...]) -> None:
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    if missing:
        names, extra = " and ".join(missing), "openvino" if "openvino" in libraries else "export"
        raise ModuleNotFoundError(f"{what} needs {names}: install covid-ct-bundles[{extra}]", name=missing[0])


def _fingerprint(network: torch.nn.Module) -> tuple:
    """Changes when a weight is replaced, or written to."""
    return tuple(
        (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
        for tensor in network.state_dict(keep_vars=True).values()
    )


def _compile(network: torch.nn.Module, image: torch.Tensor) -> Runner:
    compiled = torch.compile(network, dynamic=False)
    rows = len(image)

    def run(batch: torch.Tensor) -> torch.Tensor:
        # A batch of another size would be compiled for anew, which takes longer than it to compute.
        missing = rows - len(batch)
        if missing > 0:
            return compiled(torch.cat([batch, batch[-1:].expand(missing, -1, -1, -1)]))[: len(batch)]
        return compiled(batch)

    try:
        run(image)
    except Exception as error:  # of the compiler, the C++ compiler below it, or the network
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"backend compile does not work here, choose another: {reason}") from error
    return run


def _bf16(network: torch.nn.Module, image: torch.Tensor) -> Runner:
    def run(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast(batch.device.type, dtype=torch.bfloat16):
            return network(batch).float()

    return run


def _onnx(network: torch.nn.Module, image: torch.Tensor) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    model = export_onnx(network, image)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def run(batch: torch.Tensor) -> torch.Tensor:
        (logits,) = session.run(None, {"image": batch.contiguous().numpy()})
        return torch.from_numpy(logits)

    return run


def _openvino(network: torch.nn.Module, image: torch.Tensor) -> Runner:
    import openvino

    core = openvino.Core()
    # It would choose bfloat16 by itself where the processor has it.
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = core.compile_model(core.read_model(export_onnx(network, image)), "CPU", hints)

    def run(batch: torch.Tensor) -> torch.Tensor:
        logits = compiled({"image": batch.contiguous().numpy()}, share_inputs=True)["logits"]
        return torch.from_numpy(logits.copy())  # its memory belongs to the next call

    return run


_BUILDERS = {"compile": _compile, "bf16": _bf16, "onnx": _onnx, "openvino": _openvino}
