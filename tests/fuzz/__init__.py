"""Random MoE blocks as Python source: spellings x routers x experts x mistakes, compiled and compared with themselves."""
