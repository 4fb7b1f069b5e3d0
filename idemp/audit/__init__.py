"""The audit: are the copies that services keep of one thing still equal?"""

from idemp.audit.messages import Report, Status

__all__ = ["Report", "Status"]
