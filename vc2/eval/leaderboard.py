"""Published EvalCrafter results, as data: the leaderboard of January to April 2024, and VideoCrafter2 in its paper's
table.

Raw metrics are printed in percent, except IS, Warping_Error (both plain) and Flow_Score (mean pixels per frame pair).
VideoCrafter2's own raw metrics were never published; its aspects were measured at 1024 x 640. The paper's Table 1
mixes two scorings (arXiv 2401.09047): its row stands here for the reader and must not be ranked against the others.
"""

from collections.abc import Mapping

__all__ = ["ASPECTS", "PAPER_ROW", "RAW", "RAW_COLUMNS"]

RAW_COLUMNS = (
    "VQA_A", "VQA_T", "IS", "CLIP_Temp", "Warping_Error",
    "Face_Consistency", "Action_Score", "Motion_AC_Score", "Flow_Score",
    "CLIP_Score", "BLIP_BLEU", "SD_Score", "Detection_Score",
    "Color_Score", "Count_Score", "OCR_Score", "Celebrity_ID_Score",
)  # fmt: skip

RAW: Mapping[str, tuple[float, ...]] = {
    "Gen2 (2023.09)": (
        59.44, 76.51, 14.53, 99.94, 0.0008, 99.06, 62.53, 44.0, 0.7,
        20.53, 22.24, 68.58, 64.05, 37.56, 53.31, 75.0, 41.25,
    ),
    "ModelScope-XL": (
        40.06, 32.93, 17.64, 99.74, 0.0162, 98.94, 72.12, 42.0, 6.99,
        20.36, 22.54, 67.93, 50.01, 38.72, 44.18, 71.32, 44.56,
    ),
    "PikaLab (2023.10)": (
        59.09, 64.96, 14.81, 99.97, 0.0006, 99.62, 71.81, 44.0, 0.5,
        20.46, 21.14, 68.57, 58.99, 34.35, 51.46, 84.31, 45.21,
    ),
    "VideoCrafter V0.9": (
        58.7, 52.64, 17.01, 99.6, 0.0413, 99.08, 71.66, 74.0, 9.26,
        21.02, 22.73, 68.7, 52.44, 41.85, 58.33, 87.48, 40.07,
    ),
    "Show-1": (
        23.19, 44.24, 17.65, 99.77, 0.0067, 99.32, 81.56, 50.0, 2.07,
        20.66, 23.24, 68.42, 58.63, 48.55, 44.31, 58.97, 37.93,
    ),
    "Hotshot-XL": (
        71.54, 50.52, 17.29, 99.74, 0.0091, 99.48, 66.8, 56.0, 5.06,
        20.33, 23.59, 67.65, 45.7, 42.39, 49.5, 63.66, 38.58,
    ),
    "PikaLab V1.0": (
        69.23, 71.12, 16.67, 99.89, 0.0008, 99.22, 61.29, 42.0, 1.14,
        20.47, 21.31, 67.43, 70.26, 42.03, 62.19, 94.85, 36.53,
    ),
}  # fmt: skip

#: visual_quality, text_video_alignment, motion_quality, temporal_consistency, total (rounded by the leaderboard)
ASPECTS: Mapping[str, tuple[float, float, float, float, float]] = {
    "PikaLab V1.0": (63.05, 66.97, 56.43, 63.81, 250),
    "Gen2 (2023.09)": (62.51, 60.98, 56.43, 64.41, 244),
    "VideoCrafter2": (63.98, 63.16, 54.82, 61.46, 243),
    "LaVie-Interpolation": (57.72, 69.1, 54.08, 60.38, 241),
    "PikaLab (2023.10)": (60.77, 55.8, 55.77, 65.41, 238),
    "Hotshot-XL": (60.38, 61.52, 52.98, 59.96, 235),
    "Show-1": (52.19, 62.07, 53.74, 60.83, 229),
    "VideoCrafter V0.9": (58.78, 61.32, 49.16, 50.24, 220),
    "ModelScope-XL": (53.09, 54.46, 52.47, 57.8, 218),
}

#: VideoCrafter2 as its own paper prints it (Table 1); no total is printed there.
PAPER_ROW: tuple[float, float, float, float] = (63.28, 64.67, 53.95, 62.02)
