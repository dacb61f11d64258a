"""The frozen encoder: g_a, the quantiser and g_s, and where their weights come from."""
