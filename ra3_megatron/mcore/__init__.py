"""All that knows Megatron-Core.

Importing this package prepares Megatron-Core for machines without CUDA (`cpu.install`), so it must come before any
`megatron.core` import; every other room reaches Megatron-Core through here.
"""

from ra3_megatron.mcore import cpu

cpu.install()
