"""The pre-training objectives (OPT section 3.4) as pure functions; a loss returns (sum, count) in float32."""
