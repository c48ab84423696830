"""What a GPU would launch for compiled layers, without one: the kernels that Inductor makes of them on fake CUDA tensors, each with the bytes that it reads
and writes. Nothing is generated or compiled; Inductor's own lowering and scheduler say what is fused. Needs `fake_cuda`, and PyTorch 2.13's Inductor,
whose inside this reads."""

import contextlib
import copy
import types
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import nn
from torch.overrides import _pop_mode_temporarily

#: An H100's, as far as Inductor asks.
PROPERTIES = types.SimpleNamespace(
    name="H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 << 30,
    gcnArchName="",
    shared_memory_per_block_optin=232448,
    L2_cache_size=50 << 20,
)
#: Told of a kernel by its name, and its bytes, each time that a compiled piece of a layer runs; and whether one runs.
Launched = Callable[[str, int], None]


@contextlib.contextmanager
def compiled(launched: Launched, running: Callable[[bool], None], modes: tuple[type, ...]) -> Iterator[Callable[[nn.Module], None]]:
    """Inside, the function that is given compiles a module.

    launched  told of each kernel that is no product, attention or other call of a library
    running   told that a compiled piece begins (True), whose operations are run one by one, and that it has ended
    modes     dispatch modes that watch, under which PyTorch compiles nothing unless they allow it
    """
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import compile_fx, config
    from torch._inductor.fx_passes import joint_graph, post_grad

    def lower(gm, example_inputs, **options):
        kernels, whole = list(_kernels(copy.deepcopy(gm), example_inputs, options)), copy.deepcopy(gm)

        def call(args: list):
            for name, size in kernels:
                launched(name, size)
            running(True)
            try:
                return whole(*args)
            finally:
                running(False)
                args.clear()

        call._boxed_call = True
        return call

    def backend(gm, example_inputs):
        return compile_fx.compile_fx(gm, example_inputs, inner_compile=lower)

    changes = [
        (where, "lazy_init", lambda *args, **options: None) for where in (joint_graph, post_grad)
    ]  # patterns, which are made on a device
    changes += [(torch.accelerator, "is_available", lambda: False)]
    for name, value in {"device_count": 1, "get_device_capability": (9, 0), "get_device_properties": PROPERTIES}.items():
        changes.append((torch.cuda, name, lambda *args, value=value, **options: value))
    changes += [(torch.cuda, name, lambda device, name=name: 0) for name in ("_exchange_device", "_maybe_exchange_device")]
    changes += [(torch.cuda, "get_rng_state", lambda *args: torch.zeros(16, dtype=torch.uint8, device="cpu"))]
    changes += [(torch.cuda, "set_rng_state", lambda *args: None)]
    for owner in (CudaInterface, CudaInterface.Worker):
        changes += [(owner, "get_device_properties", lambda *args: PROPERTIES), (owner, "current_device", lambda: 0)]
    changes += [(CudaInterface, "is_available", lambda: True), (CudaInterface, "get_compute_capability", lambda *args: "90")]
    changes += [(mode, "ignore_compile_internals", classmethod(lambda cls: True)) for mode in modes]
    with contextlib.ExitStack() as stack:
        for owner, name, new in changes:
            static = isinstance(owner, type) and not isinstance(new, classmethod)
            stack.enter_context(mock.patch.object(owner, name, staticmethod(new) if static else new, create=True))
        as_in_a_run = {"skip_nnmodule_hook_guards": False, "recompile_limit": 256, "accumulated_recompile_limit": 4096}
        stack.enter_context(torch._dynamo.config.patch(as_in_a_run))
        stack.enter_context(config.patch(pattern_matcher=False, joint_graph_constant_folding=False, force_disable_caches=True))
        stack.callback(torch._dynamo.reset)

        def make(module: nn.Module) -> None:
            module.compile(backend=backend, dynamic=False)
            call = module._compiled_call_impl

            def called(*args, **options):
                with _pop_mode_temporarily():  # the default device's, which half of the tracing would be of; a layer names its devices
                    return call(*args, **options)

            module._compiled_call_impl = called

        yield make


def _kernels(gm, example_inputs, options: dict) -> Iterator[tuple[str, int]]:
    """As `compile_fx._compile_fx_inner` lowers a graph, up to its schedule."""
    from torch._guards import detect_fake_mode
    from torch._inductor import compile_fx
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
    from torch._inductor.virtualized import V

    from llmkd.planning.live_memory import operations

    known = {name: options.get(name, False) for name in ("is_inference", "is_backward")}
    compile_fx.view_to_reshape(gm)
    compile_fx._recursive_record_original_output_strides(gm)
    with V.set_fake_mode(detect_fake_mode(example_inputs)):
        compile_fx._recursive_post_grad_passes(gm, is_inference=known["is_inference"])
        env = compile_fx.shape_env_from_inputs(example_inputs)
        graph = GraphLowering(gm, example_inputs=example_inputs, shape_env=env, **known)
        with V.set_graph_handler(graph), V.set_extern_kernel_nodes([]), V.set_debug_handler(DebugContext()):
            graph.run(*example_inputs)
            graph._update_scheduler()
            for node in graph.scheduler.nodes:
                if isinstance(node, NopKernelSchedulerNode):
                    continue
                packet = getattr(getattr(node.node, "op_overload", None), "overloadpacket", None)
                if isinstance(node, ExternKernelSchedulerNode):
                    if packet is None or not operations(packet):
                        yield f"{packet or type(node.node).__name__}", node.get_read_write_buffers_sizes()
                else:
                    yield "fused by Inductor", node.get_read_write_buffers_sizes()
