"""The cluster side: plan, package, submit, supervise. Imports no torch outside the job itself."""
