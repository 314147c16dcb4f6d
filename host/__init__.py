"""The only floor that knows ComfyUI's hooks and model families.

layout.py       which row is which panel, which token is where: what a rule is told about one attention call
run.py          state of one sampling run, made in an outer wrapper and dropped at its end
override.py     one wrapper set and one chained attention override per MODEL; blocks register rules
families.py     model class -> where its self-attention is and how its tokens lie
"""
