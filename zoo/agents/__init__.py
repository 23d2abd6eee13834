"""Agents: what stands around a model and asks it several questions to answer one."""
