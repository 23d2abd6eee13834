"""The tree, both searches and the views of regions against the official ZoomEye."""

import re

import numpy as np

from tests.parity.case import Case
from zoo.agents.zoomeye import Search, find_all, find_one
from zoo.processors import crops
from zoo.processors.tiling import Box


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, from the recorded boxes or confidences."""
    return _boxes(case) if "boxes_xyxy" in case.inputs else _search(case)


def _search(case: Case) -> dict[str, np.ndarray]:
    settings = case.kwargs
    width, height = settings["image_wh"]
    tree = crops.region_tree(
        (height, width), smallest=settings["patch_size"], parts=settings["split_num"]
    )

    def judge(asked):
        return [float(case.inputs[kind][node]) for kind, node in asked]

    patience = re.match(r"\d+", str(settings["pop_limit"])).group()
    search = Search(
        bias=settings["bias_value"],
        enough=settings["threshold_upper"],
        least=settings["threshold_lower"],
        steps=tuple(settings["threshold_descrease"]),
        patience=int(patience),
        interval=settings["num_interval"],
        depth=settings["depth_limit"],
        there=settings["type2"]["visual_cue_threshold"],
        all_depth=settings["type2"]["depth_limit"],
    )
    found = find_one(
        tree,
        judge,
        search,
        skip_whole=settings["force_no_root"],
        to_bottom=settings["force_visit_bottom"],
    )
    boxes = [(b.left, b.top, b.right - b.left, b.bottom - b.top) for b in (n.box for n in tree)]
    return {
        "node_bbox_xywh": np.array(boxes),
        "node_parent": np.array([node.parent for node in tree]),
        "node_depth": np.array([node.depth for node in tree]),
        "answering_eval_order": np.array(found.looked, int),
        "candidates": np.array(found.nodes, int),
        "counts_pop_in_out": np.array([found.steps, found.zoomed_in, found.zoomed_out]),
        "type2_candidates": np.array(find_all(tree, judge, search), int),
    }


def _boxes(case: Case) -> dict[str, np.ndarray]:
    settings = case.kwargs
    boxes = [Box(y, x, y2, x2) for x, y, x2, y2 in case.inputs["boxes_xyxy"].tolist()]
    merged = crops.merge_near(boxes, settings["distance_buffer"])
    width, height = settings["image_wh"]
    patches = [
        crops.patch_around(
            Box(y, x, y + h, x + w), (height, width), side=settings["patch_size"], scale=scale
        )
        for (x, y, w, h), scale in zip(
            case.inputs["get_patch_boxes_xywh"].tolist(), settings["patch_scale"], strict=True
        )
    ]
    return {
        "merged": _xyxy(merged),
        "union": _xyxy([crops.union(boxes)])[0],
        "get_patch": _xyxy(patches),
    }


def _xyxy(boxes: list[Box]) -> np.ndarray:
    return np.array([(box.left, box.top, box.right, box.bottom) for box in boxes])
