"""The algebra: pure tensor functions that know no layer names and no files.

Tensors carry their shape in the name:

    N models · D values of one flattened layer · K kept directions · O outputs · I inputs · P stacked LoRA ranks · R one LoRA's rank
"""
