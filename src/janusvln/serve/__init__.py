"""A model behind HTTP on this machine, for a simulator that runs under another Python.

POST   /episodes                          {"instruction": "..."}           -> {"episode": ID}
POST   /episodes/ID/STEP                  an image file                    -> {"text", "action", "complete", "step"}
POST   /episodes/ID/STEP?width=W&height=H  W * H * 3 bytes of RGB           -> the same
DELETE /episodes/ID                                                        -> {}
GET    /                                                                   -> what is served, and the limits

STEP counts an episode's frames from 0; a frame that is sent again gets its answer again. What cannot be done is
{"error": one sentence} with status 400 to 499, 500 where the fault is here.
"""
