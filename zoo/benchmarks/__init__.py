"""Systems that judge models or data: evaluators and tools of analysis."""
