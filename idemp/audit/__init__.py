"""The audit: are the copies that services keep of one thing still equal?"""

from idemp.audit.messages import Report, Status
from idemp.audit.reporter import Reporter
from idemp.audit.tallier import Tallier

__all__ = ["Report", "Reporter", "Status", "Tallier"]
