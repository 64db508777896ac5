"""How each array of a call is sharded over a mesh."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sxe._call.layout import Layout, layout_of
from sxe._call.options import Options
from sxe._errors import ArgumentValueError

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
MESH = AbstractMesh((2, 2, 2), ("data", "other", "model"), axis_types=(AUTO,) * 3)


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


class Arrays(NamedTuple):
    """All inputs that calls may have, by name. A single call has fewer."""

    logits: Any = None
    hidden: Any = None
    kernel: Any = None
    labels: Any = None
    options: Any = None


@pytest.mark.parametrize(
    ("rows", "batch"),
    [
        ((), None),
        ((None,), None),
        (("data",), ("data",)),
        (("data", None, "other"), ("data", "other")),
        ((("other", "data"), "model"), ("other", "data", "model")),
    ],
)
def test_the_axes_of_the_batch(rows, batch):
    layout = Layout(MESH, rows, None)
    assert layout.batch == batch
    assert layout.of_rows() == P(*rows)


@pytest.mark.parametrize(
    ("rows", "ndim", "class_axes", "expected"),
    [
        (("data",), 2, (1,), P("data", "model")),
        (("data",), 2, (0,), P("model", "data")),
        (("data",), 3, (2,), P("data", None, "model")),
        (("data", "other"), 3, (2,), P("data", "other", "model")),
        (("data", "other"), 3, (1,), P("data", "model", "other")),
        ((None, "other"), 3, (0,), P("model", None, "other")),
        # of several class axes, the one that is named first
        (("data",), 3, (1, 2), P("data", "model", None)),
        (("data",), 3, (2, 1), P("data", None, "model")),
        (("data", "other"), 4, (2, 0), P(None, "data", "model", "other")),
        ((), 1, (0,), P("model")),
        ((), 2, (1,), P(None, "model")),
    ],
)
def test_the_axes_of_logits(rows, ndim, class_axes, expected):
    assert Layout(MESH, rows, "model").of_logits(ndim, class_axes) == expected
    without = P(*(None if axis == "model" else axis for axis in expected))
    assert Layout(MESH, rows, None).of_logits(ndim, class_axes) == without


OPTIONS = Options(
    where=shape(8, 4),
    weights=shape(8, 4),
    class_weights=shape(6),
    class_mask=shape(6),
    label_smoothing=shape(),
    z_loss=shape(),
    bias=shape(6),
    logit_scale=shape(),
    softcap=shape(),
)


def test_specs_by_name():
    inputs = Arrays(shape(8, 4, 6), shape(8, 4, 5), shape(10, 6), shape(8, 4), OPTIONS)
    layout = Layout(MESH, ("data", "other"), "model", fsdp="data")
    specs = layout.specs(inputs, 3, (2,))
    assert specs[:4] == (
        P("data", "other", "model"),
        P("data", "other"),
        P("data", "model"),
        P("data", "other"),
    )
    assert specs.options == OPTIONS.replace(
        where=P("data", "other"),
        weights=P("data", "other"),
        class_weights=P("model"),
        class_mask=P("model"),
        label_smoothing=P(),
        z_loss=P(),
        bias=P("model"),
        logit_scale=P(),
        softcap=P(),
    )
    of_rows = layout.specs(inputs._replace(options=Options(logit_scale=shape(8, 4))), 3, (2,))
    assert of_rows.options == Options(logit_scale=P("data", "other"))


@pytest.mark.parametrize("class_axes", [(2,), (0,), (1, 2)])
def test_dense_labels_and_a_mask_of_classes_are_split_as_logits(class_axes):
    logits = shape(8, 4, 6)
    inputs = Arrays(logits, labels=logits, options=Options(where=logits))
    layout = Layout(MESH, ("data",), "model")
    expected = layout.of_logits(3, class_axes)
    specs = layout.specs(inputs, 3, class_axes)
    assert specs.logits == specs.labels == specs.options.where == expected
    assert layout.of_rows() != expected


@pytest.mark.parametrize("classes", [3, 6])
def test_several_labels_in_a_row_are_split_as_rows(classes):
    """Also if there are as many labels per row as classes."""
    labels = jax.ShapeDtypeStruct((8, 4, 6), jnp.int32)
    options = Options(label_weights=shape(8, 4, 6))
    layout = Layout(MESH, ("data",), "model")
    specs = layout.specs(Arrays(shape(8, 4, classes * 2), labels=labels, options=options), 3, (2,))
    assert specs.labels == specs.options.label_weights == layout.of_rows()


def test_an_option_that_is_off_has_no_spec():
    specs = Layout(MESH, ("data",), "model").specs(Arrays(shape(8, 6)), 2, (1,))
    assert specs == Arrays(P("data", "model"))
    specs = Layout(MESH, ("data",), "model").specs(Arrays(options=Options()), 2, (1,))
    assert jax.tree.leaves(specs) == []


ROWS = "pad the rows, and mask them with where"
CLASSES = "pad the classes, and mask them with class_mask"
KERNEL = "shard it over other mesh axes, or over none"


@pytest.mark.parametrize(
    ("inputs", "layout", "argument", "axis", "devices", "axes", "advice"),
    [
        ({"logits": shape(7, 8)}, {}, "logits", 0, 4, ("data", "other"), ROWS),
        ({"logits": shape(8, 7)}, {}, "logits", 1, 2, ("model",), CLASSES),
        ({"hidden": shape(6, 7)}, {}, "hidden", 0, 4, ("data", "other"), ROWS),
        ({"labels": shape(6)}, {}, "labels", 0, 4, ("data", "other"), ROWS),
        ({"kernel": shape(4, 7)}, {}, "kernel", 1, 2, ("model",), CLASSES),
        ({"kernel": shape(7, 8)}, {"fsdp": "data"}, "kernel", 0, 2, ("data",), KERNEL),
        ({"options": Options(bias=shape(7))}, {}, "bias", 0, 2, ("model",), CLASSES),
        ({"options": Options(weights=shape(6))}, {}, "weights", 0, 4, ("data", "other"), ROWS),
        (
            {"logits": shape(8, 6)},
            {"classes": ("model", "data"), "rows": ("other",)},
            *("logits", 1, 4, ("model", "data"), CLASSES),
        ),
    ],
)
def test_sizes_that_devices_do_not_divide(inputs, layout, argument, axis, devices, axes, advice):
    layout = Layout(**{"mesh": MESH, "rows": (("data", "other"),), "classes": "model"} | layout)
    with pytest.raises(ArgumentValueError) as error:
        layout.specs(Arrays(**inputs), 2, (1,))
    assert error.value.argument == argument
    assert error.value.message.startswith(
        f"expected a size along axis {axis} that is a multiple of {devices}, the number of devices "
        f"along {axes}, got shape ("
    )
    assert f"; {advice}" in error.value.message


@pytest.mark.parametrize(("class_axes", "most"), [((2,), 2), ((1, 2), 1)])
def test_more_entries_than_axes_of_the_rows(class_axes, most):
    layout = Layout(MESH, ("data", None, "other"), "model")
    message = rf"^batch: expected entries for at most {most} axes, .* got .*'data', None, 'other'"
    with pytest.raises(ValueError, match=message):
        layout.specs(Arrays(shape(8, 8, 8)), 3, class_axes)
    fits = layout._replace(rows=("data", "other")[:most])
    assert fits.specs(Arrays(shape(8, 8, 8)), 3, class_axes).logits[0] == "data"


# The computation on each device.


def total_and_names(seen):
    def result(inputs):
        seen.append((inputs.logits.shape, inputs.options))
        axes = (*(inputs.options.axis_name or ()), *(inputs.options.batch_axis_name or ()))
        total = jnp.sum(inputs.logits)
        return lax.psum(total, axes) if axes else total

    return result


@pytest.mark.parametrize(
    "kinds", [(AUTO, AUTO), (EXPLICIT, EXPLICIT), (AUTO, EXPLICIT), (EXPLICIT, AUTO)], ids=str
)
@pytest.mark.parametrize(
    ("rows", "classes", "part", "axis_name", "batch_axis_name"),
    [
        (("data",), "model", (4, 4), ("model",), ("data",)),
        ((None,), ("model", "data"), (8, 2), ("model", "data"), None),
        ((("model", "data"),), None, (1, 16), None, ("model", "data")),
        ((), None, (8, 16), None, None),
    ],
)
def test_run_gives_each_device_its_part(kinds, rows, classes, part, axis_name, batch_axis_name):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=kinds)
    logits = jnp.arange(8.0 * 16).reshape(8, 16)
    layout, seen = Layout(mesh, rows, classes), []
    with jax.set_mesh(mesh):
        inputs = Arrays(logits, options=Options())
        total = layout.run(total_and_names(seen), inputs, (1,), ndim=2, out=P())
    assert total == jnp.sum(logits)
    assert seen == [(part, Options(axis_name=axis_name, batch_axis_name=batch_axis_name))]


@pytest.mark.parametrize(
    ("kinds", "divided"),
    [((EXPLICIT,), ("data",)), ((AUTO,), ("model",)), ((AUTO, EXPLICIT), ("data", "model"))],
    ids=str,
)
def test_run_divides_along_mesh_axes_of_its_kinds_alone(kinds, divided):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(EXPLICIT, AUTO))
    layout = Layout(
        mesh,
        rows=("data" if "data" in divided else None,),
        classes="model" if "model" in divided else None,
        kinds=kinds,
    )

    def result(inputs):
        assert set(jax.sharding.get_abstract_mesh().manual_axes) == set(divided)
        return lax.psum(jnp.sum(inputs.logits), divided)

    logits = jnp.arange(8.0 * 16).reshape(8, 16)
    with jax.set_mesh(mesh):
        inputs = Arrays(logits, options=Options())
        run = jax.jit(lambda inputs: layout.run(result, inputs, (1,), ndim=2, out=P()))
        assert run(inputs) == jnp.sum(logits)


# Types on an Explicit mesh.


def explicit(*sizes, names=("data", "other", "model")):
    return jax.make_mesh(sizes, names, axis_types=(EXPLICIT,) * len(sizes))


def split(mesh, *specs):
    """Hidden states [8, 4, 8] and a kernel [8, 16], sharded by these specs; None: on no mesh."""
    arrays = jnp.zeros((8, 4, 8)), jnp.zeros((8, 16))
    return [
        x if spec is None else jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(arrays, specs, strict=True)
    ]


@pytest.mark.parametrize(
    ("hidden", "kernel", "rows", "classes", "fsdp"),
    [
        (P(), P(), (None, None), None, None),
        (P("data"), P(), ("data", None), None, None),
        (P("data"), P(None, "model"), ("data", None), "model", None),
        (P(None, "data"), P(None, ("model", "other")), (None, "data"), ("model", "other"), None),
        (P("data", "other"), P("data", "model"), ("data", "other"), "model", "data"),
        (P("data", "other"), P("other"), ("data", "other"), None, "other"),
        (P(("data", "other")), P("other"), (("data", "other"), None), None, "other"),
        # over a mesh axis that does not shard the rows: the compiler handles it
        (P("data"), P("other", "model"), ("data", None), "model", None),
        (P("data"), P(("data", "other"), "model"), ("data", None), "model", None),
        # one of the two is on no mesh
        (P("data"), None, ("data", None), None, None),
        (None, P(None, "model"), (None, None), "model", None),
    ],
)
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "jit"])
def test_the_layout_that_types_have(hidden, kernel, rows, classes, fsdp, traced):
    mesh, found = explicit(2, 2, 2), []

    def look(*arrays):
        found.append(layout_of(*arrays))

    (jax.jit(look) if traced else look)(*split(mesh, hidden, kernel))
    (layout,) = found
    assert layout[1:] == (rows, classes, fsdp, (EXPLICIT,))
    assert layout.mesh.axis_names == mesh.axis_names
    assert layout.mesh.shape == mesh.shape


def test_the_layout_of_arrays_on_no_mesh():
    layout = layout_of(*split(None, None, None))
    assert layout.mesh.empty
    assert (layout.rows, layout.classes, layout.fsdp) == ((None, None), None, None)


@pytest.mark.parametrize(
    ("hidden", "kernel", "message"),
    [
        (
            P(None, None, "data"),
            P(),
            r"^hidden: expected a last axis that is not sharded, got float32\[8,4,8@data\]",
        ),
        (
            P("data", "other"),
            P(None, ("model", "other")),
            r"^kernel: expected classes that are sharded over other mesh axes than the rows, "
            r"got \{'other'\} for both \(float32\[8@data,4@other,8\], ",
        ),
    ],
)
def test_types_that_no_layout_has(hidden, kernel, message):
    with pytest.raises(ValueError, match=message):
        layout_of(*split(explicit(2, 2, 2), hidden, kernel))
