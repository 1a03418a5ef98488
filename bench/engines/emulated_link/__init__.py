"""A slower link between nodes, imitated on GPUs of one host: after dispatch and combine the stream waits as long as the
remote bytes would take.

It is a plugin of SGLang, no patch: nothing of it is in the series or in the package that production servers run.
"""
