"""svc: the sample service.  ``SERVICE_NAME=orders IDEMP_STORE=sqlite:///seen.db python -m svc``"""
