"""Linear algebra: pure tensor functions, without layer names and files.

Tensors carry their shape in the name:

    N models · D values of one flattened layer · K kept directions · O outputs · I inputs · P stacked LoRA ranks · R one LoRA's rank
"""
