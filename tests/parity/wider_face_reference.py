"""WIDER FACE's AP in plain Python, one detection, threshold and face after the other."""


def overlap(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    if width <= 0 or height <= 0:
        return 0.0
    area_a = (a[2] - a[0] + 1) * (a[3] - a[1] + 1)
    area_b = (b[2] - b[0] + 1) * (b[3] - b[1] + 1)
    return width * height / (area_a + area_b - width * height)


def reference_ap(images):
    """
    Return the AP of a level.

    Args:
        images: of each the faces (box, counts) and the detections (box, score), by falling score.
    """
    scores = [score for _, found in images for _, score in found]
    low, high = min([1.0, *scores]), max([0.0, *scores])
    total = sum(counts for faces, _ in images for _, counts in faces)
    curve = [[0, 0] for _ in range(1000)]
    for faces, found in images:
        if not faces or not found:
            continue
        recalled, proposals, recalls = set(), [], []
        for box, _ in found:
            overlaps = [overlap(box, face) for face, _ in faces]
            best = overlaps.index(max(overlaps))
            counts = True
            if overlaps[best] >= 0.5:
                if faces[best][1]:
                    recalled.add(best)
                else:
                    counts = False
            proposals.append(counts)
            recalls.append(len(recalled))
        stretched = [(score - low) / (high - low) for _, score in found]
        for t in range(1000):
            kept = [i for i, score in enumerate(stretched) if score >= 1 - (t + 1) / 1000]
            if kept:
                curve[t][0] += sum(proposals[: kept[-1] + 1])
                curve[t][1] += recalls[kept[-1]]
    points = [(found / total, found / number if number else 0.0) for number, found in curve]
    area, recall = 0.0, 0.0
    for i, (reached, _) in enumerate(points):
        area += (reached - recall) * max(precision for _, precision in points[i:])
        recall = reached
    return area
