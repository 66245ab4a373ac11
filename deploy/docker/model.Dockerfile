# An exported model as an image, for the overlay oci-model. From the folder that holds it, with its SHA256SUMS:
#   docker build -f .../model.Dockerfile --build-arg MODEL=infinite-1b -t REGISTRY/infinite-1b:1 .
FROM scratch
ARG MODEL
COPY ${MODEL} /${MODEL}
