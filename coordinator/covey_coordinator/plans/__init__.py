"""Plans: a torch module compiled into ONNX graphs, and their files.

`bundle` reads and writes plans and needs no torch: a coordinator runs rounds without it. `compile`
and what it builds on (`trace`, `losses`, `decompositions`, `fuse`, `lower`, `verify`, `diagnose`)
import torch and are imported only when a plan is compiled.
"""
