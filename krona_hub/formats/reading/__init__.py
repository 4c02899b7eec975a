"""From a file to an adapter: plan, decode, describe."""
