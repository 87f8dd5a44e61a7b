"""FP8 export: calibrated and quantised by NVIDIA's modelopt, written as a folder that vLLM loads, and measured."""
